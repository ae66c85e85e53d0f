"""Image processor and processor under their published names, read from `preprocessor_config.json` and the tokenizer."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prismatic.libraries import (
    BaseImageProcessor,
    BatchFeature,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    cached_file,
)
from prismatic.stored_files import BYTE_ORDER_MARK, foreign_code_only, read_json
from prismatic.vla.transform import PixelSpec, normalize_pixels

ImageInput = Image.Image | np.ndarray
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
"""Either holds the image processor's settings; the second one those of the whole processor."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_STRATEGIES = ("resize-naive", "letterbox", "resize-crop")


class PrismaticImageProcessor(BaseImageProcessor):
    """Resize to the ViTs' input size and normalise once per ViT, channels stacked.

    Keyword arguments are the keys of the published `preprocessor_config.json`, which are kept and written back, but for
    null values, `processor_class` and references to code (`auto_map`). As in the published class, `tvf_resize_params`,
    `tvf_crop_params`, `tvf_normalize_params` (a dictionary per ViT each) and `tvf_do_letterbox` are computed from the
    arguments that stand in the signature, unless they are given: then they are what counts.

    Raises ValueError for settings that resize otherwise than to the square that the ViTs see.
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
        super().__init__(**kwargs)
        self._check_resizing()
        _ = self.pixels  # raises ValueError where constants are missing

    @property
    def pixels(self) -> PixelSpec:
        """Size and channel normalisation."""
        given = getattr(self, "tvf_normalize_params", None)
        means = self.means if given is None else [part.get("mean") for part in given]
        stds = self.stds if given is None else [part.get("std") for part in given]
        key = "means / stds" if given is None else "tvf_normalize_params"
        for values in (means, stds):
            if len(values) != len(self.input_sizes) or not all(_is_rgb(value) for value in values):
                raise ValueError(
                    f"image processor: {key} {values} should hold three numbers for each of "
                    f"{len(self.input_sizes)} ViTs"
                )
        spec_means = tuple((m[0], m[1], m[2]) for m in means)
        return PixelSpec(self.input_sizes[0][-1], spec_means, tuple((s[0], s[1], s[2]) for s in stds))

    def _check_resizing(self) -> None:
        """Raises ValueError for a size, crop or border other than a plain resize to the square of the first ViT."""
        strategy, size = self.image_resize_strategy, self.input_sizes[0][-1]
        if strategy not in _STRATEGIES:
            raise ValueError(f"image_resize_strategy {strategy!r} is unknown; known: {', '.join(_STRATEGIES)}")
        naive = [size, size] if strategy == "resize-naive" else size
        resized = getattr(self, "tvf_resize_params", None) or [{"size": naive}] * len(self.input_sizes)
        cropped = getattr(self, "tvf_crop_params", None) or [{"output_size": size}]
        letterbox = getattr(self, "tvf_do_letterbox", strategy == "letterbox")
        square = (size, [size], [size, size])
        found = {
            "input_sizes": [wanted for wanted in self.input_sizes if wanted[-2:] != [size, size]],
            "tvf_do_letterbox": letterbox,
            "tvf_resize_params": [
                part for part in resized if _plain(part.get("size")) != [size, size] or part.get("max_size") is not None
            ],
            "tvf_crop_params": [part for part in cropped if _plain(part.get("output_size")) not in square],
        }
        for key, odd in found.items():
            if odd:
                raise ValueError(
                    f"image processor: {key} {odd} (image_resize_strategy {strategy!r}) is not supported; images are "
                    f"resized to {size} x {size} pixels without border or crop, as 'resize-naive' says"
                )
        _ = self._resampling

    @property
    def _resampling(self) -> list[Image.Resampling]:
        """How images are resized for each ViT."""
        params = getattr(self, "tvf_resize_params", None)
        given = self.interpolations if params is None else [part.get("interpolation", "bicubic") for part in params]
        names = {method.name.lower(): method for method in Image.Resampling}
        known: dict[Any, Image.Resampling] = {**names, **{method.value: method for method in Image.Resampling}}
        if len(given) != len(self.input_sizes) or any(method not in known for method in given):
            raise ValueError(
                f"image processor: interpolations {given} should hold one of {', '.join(names)} for each of "
                f"{len(self.input_sizes)} ViTs"
            )
        return [known[method] for method in given]

    def preprocess(
        self, images: ImageInput | Sequence[ImageInput], return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """One or several RGB images -> {"pixel_values": (n, 3 * ViTs, S, S) float32}."""
        single = isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3
        batch: Any = [images] if single else images
        return BatchFeature(
            {"pixel_values": torch.stack([self._normalized(image) for image in batch])}, tensor_type=return_tensors
        )

    def _normalized(self, image: ImageInput) -> torch.Tensor:
        pixels, parts = self.pixels, []
        for method, mean, std in zip(self._resampling, pixels.means, pixels.stds, strict=True):
            resized = self._resize(image, pixels.size, method)
            parts.append(normalize_pixels(resized[None], PixelSpec(pixels.size, (mean,), (std,))))
        return torch.cat(parts)

    def _resize(self, image: ImageInput, size: int, method: Image.Resampling) -> np.ndarray:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture = picture.convert("RGB")
        if picture.size != (size, size):
            picture = picture.resize((size, size), method)
        return np.asarray(picture)

    def to_dict(self) -> dict[str, Any]:
        """All settings, without references to code that is not saved beside them."""
        return foreign_code_only(super().to_dict())

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
        path = str(Path(pretrained_model_name_or_path).expanduser())
        hub: dict[str, Any] = {
            key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs
        }

        def found(name: str) -> Path | None:
            file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
            return None if file is None else Path(file)

        stored = {name: file for name in (*IMAGE_FILES, *TOKENIZER_FILES) if (file := found(name)) is not None}
        if "tokenizer.json" not in stored:
            raise FileNotFoundError(
                f"{path} has no tokenizer.json; copy the tokenizer files of the base checkpoint there"
            )
        settings = image_settings(stored)
        if settings is None:
            raise FileNotFoundError(f"{path} has neither {' nor '.join(IMAGE_FILES)}; copy it from the base checkpoint")
        tokenizer = _load_tokenizer(path, {name: stored[name] for name in TOKENIZER_FILES if name in stored}, hub)
        return cls(PrismaticImageProcessor(**settings), tokenizer)


def image_settings(stored: Mapping[str, Path]) -> dict[str, Any] | None:
    """The image processor's settings by its files' names; None where none of them holds any.

    As transformers decides, what `processor_config.json` holds comes before `preprocessor_config.json`.
    Raises ValueError naming a file that is no JSON.
    """
    plain, whole = IMAGE_FILES
    if whole in stored and isinstance(nested := read_json(stored[whole]).get("image_processor"), dict):
        return nested
    return read_json(stored[plain]) if plain in stored else None


def _load_tokenizer(path: str, files: Mapping[str, Path], hub: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer as its files stand; its library reads no byte order marks, so copies without them are read."""
    contents = {name: (read_json(file), file.read_bytes())[1] for name, file in files.items()}
    if any(content.startswith(BYTE_ORDER_MARK) for content in contents.values()):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in contents.items():
                (Path(folder) / name).write_bytes(content.removeprefix(BYTE_ORDER_MARK))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **hub)
    tokenizer.padding_side = "right"
    tokenizer.init_kwargs = foreign_code_only(tokenizer.init_kwargs)
    return tokenizer


def _is_rgb(values: Any) -> bool:
    numbers = values if isinstance(values, Sequence) and not isinstance(values, str) else ()
    return len(numbers) == 3 and all(isinstance(number, int | float) for number in numbers)


def _plain(size: Any) -> Any:
    return list(size) if isinstance(size, Sequence) else size
