"""Where in the model visual tokens are dropped: the pruner declares a site, the part it lies in offers the step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Projector:
    """Between the projector and the language model; the pruner sees patches (B, V, D)."""


@dataclass(frozen=True)
class VisionBlock:
    """Behind block `block` (0, 1, ...) of the ViTs; the pruner sees their features side by side, (B, V, F).

    The features of all ViTs make one token, so a fused backbone drops the same patches everywhere; the tokens of all
    images of a sample make one row, so cameras compete.
    """

    block: int


@dataclass(frozen=True)
class LlamaLayer:
    """Before layer `layer` of the language model; the pruner sees the visual tokens' hidden rows, (B, V, D)."""

    layer: int


@dataclass(frozen=True)
class LlamaKeys:
    """In all layers of the language model: what is not selected is not computed, but stays there to be attended to.

    Its keys and values are those of the session's last query. The pruner sees patches (B, V, D), as at `Projector`.

    Attributes:
        layer: whose attention to the visual tokens is remembered; None: the middle one.
    """

    layer: int | None = None


Site = Projector | VisionBlock | LlamaLayer | LlamaKeys


@dataclass(frozen=True)
class ModelSizes:
    """What a pruner may have to know about the model.

    Attributes:
        num_images: I, images of one sample.
        grid: patches of one image, down and across.
        vision_dim: F, features of one patch, all ViTs together.
        vision_blocks: blocks that run, of the ViT with the fewest.
        llm_dim: D.
        llm_layers: of the language model.
    """

    num_images: int
    grid: tuple[int, int]
    vision_dim: int
    vision_blocks: int
    llm_dim: int
    llm_layers: int

    @property
    def num_visual(self) -> int:
        """V, visual tokens of one sample."""
        return self.num_images * self.grid[0] * self.grid[1]


def site_width(site: Site, sizes: ModelSizes) -> int:
    """Width of what the pruner sees at its site."""
    return sizes.vision_dim if isinstance(site, VisionBlock) else sizes.llm_dim


def check_site(site: Site, sizes: ModelSizes) -> None:
    """Raises ValueError for a site that the model does not have, or at which dropping tokens would save nothing.

    At least one block or layer must run behind the site, and in the language model one before it.
    """
    if isinstance(site, VisionBlock) and not site.block <= sizes.vision_blocks - 2:
        raise ValueError(
            f"site=vision,layer={site.block}: the ViTs run blocks 0 to {sizes.vision_blocks - 1}, and one must be left "
            f"to run over the kept tokens; {_choices(0, sizes.vision_blocks - 2)}"
        )
    if isinstance(site, LlamaKeys) and site.layer is not None and site.layer > sizes.llm_layers - 1:
        raise ValueError(
            f"layer={site.layer}: the language model has layers 0 to {sizes.llm_layers - 1}; choose one of them, or "
            "leave it out for the middle one"
        )
    if isinstance(site, LlamaLayer) and not 1 <= site.layer <= sizes.llm_layers - 1:
        raise ValueError(
            f"site=llama,layer={site.layer}: tokens are dropped before that layer, one must have run by then, and the "
            f"language model has layers 0 to {sizes.llm_layers - 1}; {_choices(1, sizes.llm_layers - 1)}"
        )


def _choices(first: int, last: int) -> str:
    return f"choose layer {first} to {last}, or site=projector" if first <= last else "choose site=projector"
