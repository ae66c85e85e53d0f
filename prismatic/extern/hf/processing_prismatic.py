"""Image processor and processor under their published names, read from `preprocessor_config.json` and the tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.hub import cached_file

from prismatic.vla.transform import PixelSpec, normalize_pixels

ImageInput = Image.Image | np.ndarray
_INTERPOLATION = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class PrismaticImageProcessor(BaseImageProcessor):
    """Resize to the ViTs' input size and normalise once per ViT, channels stacked.

    Keyword arguments are the keys of the published `preprocessor_config.json`; all are kept and written back.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "resize-naive",
        input_sizes: Sequence[Sequence[int]] | None = None,
        interpolations: Sequence[str] | None = None,
        means: Sequence[Sequence[float]] | None = None,
        stds: Sequence[Sequence[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [list(size) for size in input_sizes or [(3, 224, 224)]]
        self.interpolations = list(interpolations or ["bicubic"] * len(self.input_sizes))
        self.means = [list(mean) for mean in means or [(0.5, 0.5, 0.5)]]
        self.stds = [list(std) for std in stds or [(0.5, 0.5, 0.5)]]
        if image_resize_strategy != "resize-naive":
            raise ValueError(f"image_resize_strategy {image_resize_strategy!r} is not supported; use 'resize-naive'")
        super().__init__(**kwargs)

    @property
    def pixels(self) -> PixelSpec:
        """Size and channel normalisation."""
        means = tuple((m[0], m[1], m[2]) for m in self.means)
        return PixelSpec(self.input_sizes[0][-1], means, tuple((s[0], s[1], s[2]) for s in self.stds))

    def preprocess(
        self, images: ImageInput | Sequence[ImageInput], return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """One or several RGB images -> {"pixel_values": (n, 3 * ViTs, S, S) float32}."""
        single = isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3
        batch: Any = [images] if single else images
        size = self.pixels.size
        values = torch.stack([normalize_pixels(self._resize(image, size)[None], self.pixels) for image in batch])
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def _resize(self, image: ImageInput, size: int) -> np.ndarray:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture = picture.convert("RGB")
        if picture.size != (size, size):
            picture = picture.resize((size, size), _INTERPOLATION[self.interpolations[0]])
        return np.asarray(picture)

    def __call__(  # type: ignore[override]
        self, images: ImageInput | Sequence[ImageInput], *args: Any, **kwargs: Any
    ) -> BatchFeature:
        """As `preprocess`."""
        return self.preprocess(images, *args, **kwargs)


class PrismaticProcessor(ProcessorMixin):
    """Tokenizer and image processor together."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: PrismaticImageProcessor, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        text: str | list[str],
        images: ImageInput | Sequence[ImageInput],
        padding: bool | str = True,
        truncation: bool | None = None,
        max_length: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prompts and as many images -> input_ids (B, T), attention_mask (B, T), pixel_values (B, 3 * ViTs, S, S).

        Raises ValueError where the numbers of texts and images differ.
        """
        values = self.image_processor(images, return_tensors=return_tensors)["pixel_values"]
        texts = [text] if isinstance(text, str) else text
        tokens = self.tokenizer(
            texts, padding=padding, truncation=truncation, max_length=max_length, return_tensors=return_tensors
        )
        if len(values) != len(texts):
            raise ValueError(f"{len(texts)} texts came with {len(values)} images; pass one image per text")
        parts = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "pixel_values": values}
        return BatchFeature(parts)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "PrismaticProcessor":  # type: ignore[override]
        """From a folder or hub id. The tokenizer is `tokenizer.json` as it stands, never rebuilt."""
        path = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        if cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub) is None:
            raise FileNotFoundError(
                f"{path} has no tokenizer.json; copy the tokenizer files of the base checkpoint there"
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **hub)
        tokenizer.padding_side = "right"
        return cls(PrismaticImageProcessor.from_pretrained(path, **hub), tokenizer)
