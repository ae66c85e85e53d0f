"""A model that is built once, without memory, and given its stored tensors as they lie in their files."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from prismatic.extern.hf.building import NoValues
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.film import has_film

_FILM_REPLACES = "vision_backbone."


def build_on_meta(config: OpenVLAConfig) -> OpenVLAForActionPrediction:
    """The model with parameters on the meta device: names, shapes, dtypes, and no values."""
    with NoValues():
        return OpenVLAForActionPrediction(config)


def outline(model: OpenVLAForActionPrediction, dtype: torch.dtype, film: Path | None) -> None:
    """Leave a model on the meta device as `fill` would leave it, but for the values."""
    _record(model, dtype, film)
    module: nn.Module = model
    module.to("meta", dtype)


def fill(
    model: OpenVLAForActionPrediction,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    film: Path | None,
) -> None:
    """Give a model on the meta device its weights, one tensor after another, and leave it as evaluation wants it.

    A tensor that needs no other dtype or device stays mapped into memory: it takes none until it is read, and what is
    written to it never reaches the file.

    Args:
        model: from `build_on_meta`.
        read: name -> stored tensor.
        dtype: of all parameters.
        device: where they go, without a detour.
        film: the component with FiLM, which takes the place of the whole vision backbone; None: there is none.

    Raises ValueError for FiLM that does not fit.
    """
    _record(model, dtype, film)
    given = model.film_state(film) if film is not None else {}
    state = {}
    for name in model.state_dict():
        value = given[name.removeprefix(_FILM_REPLACES)] if given and name.startswith(_FILM_REPLACES) else read(name)
        state[name] = value.to(device, dtype)
    model.load_state_dict(state, assign=True)
    _place_buffers(model, device)
    model.eval()


def _record(model: OpenVLAForActionPrediction, dtype: torch.dtype, film: Path | None) -> None:
    """What transformers and `StoredModel` record of a loaded model."""
    config = model.config
    config.dtype = config.llama.dtype = dtype
    config.use_film = film is not None
    if film is not None and not has_film(model.vision_backbone):
        with NoValues():
            model.enable_film()


def _place_buffers(model: OpenVLAForActionPrediction, device: torch.device) -> None:
    """Buffers that no file holds, such as the rotation's frequencies, go where the parameters are, in their dtype."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(f"config.json describes a model with a table {name!r} that nobody computes")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
