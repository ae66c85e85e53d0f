"""The image processor against torchvision, and processors in all the layouts that people save."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as torchvision_functional
from transformers import AutoImageProcessor, AutoProcessor

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.policy import Policy

PUBLISHED: dict[str, Any] = {
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 224, 224], [3, 224, 224]],
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "processor_class": "PrismaticProcessor",
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    "tvf_crop_params": [{"output_size": [224, 224]}, {"output_size": [224, 224]}],
    "tvf_do_letterbox": False,
    "tvf_letterbox_fill": None,
    "tvf_normalize_params": [
        {"inplace": False, "mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
        {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ],
    "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": [224, 224]}] * 2,
    "use_fused_vision_backbone": True,
}
"""As published folders hold it."""


def by_torchvision(image: Image.Image, settings: dict[str, Any] = PUBLISHED) -> torch.Tensor:
    """What the published class does with these settings: resize, crop, normalise, for each ViT in turn."""
    parts = []
    for index in range(len(settings["input_sizes"])):
        resize = settings["tvf_resize_params"][index]
        method = torchvision_functional._interpolation_modes_from_int(resize["interpolation"])
        resized = torchvision_functional.resize(image, resize["size"], method)
        cropped = torchvision_functional.center_crop(resized, settings["tvf_crop_params"][index]["output_size"])
        values = torchvision_functional.to_tensor(cropped)
        normalize = settings["tvf_normalize_params"][index]
        parts.append(torchvision_functional.normalize(values, normalize["mean"], normalize["std"]))
    return torch.cat(parts)


def picture(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


@pytest.fixture
def published(reference_directory: Path, tmp_path: Path) -> Path:
    """The reference's checkpoint with the image processor's file as published."""
    folder = Path(shutil.copytree(reference_directory, tmp_path / "published"))
    (folder / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    return folder


@pytest.mark.parametrize("size", [224, 256, 97])
def test_the_processor_gives_the_published_classes_pixels(size: int):
    image = picture(size)
    found = PrismaticImageProcessor(**PUBLISHED)([image, Image.fromarray(image)])["pixel_values"]
    expected = by_torchvision(Image.fromarray(image))
    torch.testing.assert_close(found, torch.stack([expected, expected]), rtol=0, atol=1e-6)
    unrounded = {key: value for key, value in PUBLISHED.items() if not key.startswith("tvf_")}
    before = PrismaticImageProcessor(**unrounded)(image)["pixel_values"][0]
    assert 5e-3 < (before - expected).abs().max() < 2e-2, "the keys make a difference"


def test_vits_may_resize_differently():
    resize = [{"interpolation": 2, "size": [224, 224]}, {"interpolation": 1, "size": [224, 224]}]
    settings = {**PUBLISHED, "tvf_resize_params": resize}
    image = picture(300)
    found = PrismaticImageProcessor(**settings)(image)["pixel_values"][0]
    torch.testing.assert_close(found, by_torchvision(Image.fromarray(image), settings), rtol=0, atol=1e-6)


def test_policy_training_and_processor_share_the_constants(published: Path, tmp_path: Path):
    images = np.stack([picture(224), picture(224, 1)])
    expected = torch.cat([by_torchvision(Image.fromarray(image)) for image in images])
    saved = save_checkpoint(tmp_path / "run--1_chkpt", load_checkpoint(published), 1)
    assert (saved / "preprocessor_config.json").read_bytes() == (published / "preprocessor_config.json").read_bytes()
    for folder in (published, saved):
        policy = Policy.from_pretrained(folder, dtype="float32")
        torch.testing.assert_close(policy.transform.pixel_values(images), expected, rtol=0, atol=1e-6)
        training = policy.checkpoint.transform("libero_tiny_no_noops", True)  # what training's data is made with
        assert torch.equal(training.pixel_values(images), policy.transform.pixel_values(images))
        by_hand = policy.processor.image_processor(list(images))["pixel_values"]
        assert torch.equal(by_hand.flatten(0, 1), policy.transform.pixel_values(images))


@pytest.mark.parametrize("whole", [False, True])
def test_settings_survive_being_saved_as_transformers_saves(published: Path, tmp_path: Path, whole: bool):
    """A whole processor is saved as `processor_config.json`, an image processor alone as `preprocessor_config.json`."""
    processor = AutoProcessor.from_pretrained(published)
    folder = tmp_path / "saved"
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("*processor_config.json", "tokenizer*"))
    (processor if whole else processor.image_processor).save_pretrained(folder)
    if not whole:
        processor.tokenizer.save_pretrained(folder)
    assert (folder / "processor_config.json").is_file() == whole != (folder / "preprocessor_config.json").is_file()
    expected = by_torchvision(Image.fromarray(picture(256)))[None]
    for loaded in (
        AutoProcessor.from_pretrained(folder).image_processor,
        AutoImageProcessor.from_pretrained(folder),
        PrismaticProcessor.from_pretrained(folder).image_processor,
        Policy.from_pretrained(folder).processor.image_processor,
    ):
        torch.testing.assert_close(loaded(picture(256))["pixel_values"], expected, rtol=0, atol=1e-6)
    again = save_checkpoint(tmp_path / "again", load_checkpoint(folder), 1)
    assert load_checkpoint(again).processor.image_processor.pixels == processor.image_processor.pixels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tvf_do_letterbox": True}, "tvf_do_letterbox True"),
        ({"image_resize_strategy": "letterbox", "tvf_do_letterbox": True}, "image_resize_strategy 'letterbox'"),
        ({"tvf_crop_params": [{"output_size": [200, 200]}] * 2}, r"tvf_crop_params .*200.* is not supported"),
        ({"tvf_resize_params": [{"size": 224, "interpolation": 3}] * 2}, "tvf_resize_params .* is not supported"),
        ({"tvf_resize_params": [{"size": [256, 256], "interpolation": 3}] * 2}, "resized to 224 x 224 pixels"),
        ({"tvf_resize_params": [{"size": [224, 224], "interpolation": 17}] * 2}, "interpolations .17, 17. should hold"),
        ({"tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.5] * 3}]}, "three numbers for each of 2 ViTs"),
        ({"tvf_normalize_params": [{"mean": [0.5] * 3}] * 2}, "tvf_normalize_params .None, None."),
        ({"input_sizes": [[3, 224, 224], [3, 384, 384]]}, "input_sizes .*384"),
        ({"image_resize_strategy": "stretch"}, "'stretch' is unknown; known: resize-naive, letterbox, resize-crop"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(published: Path, change: dict[str, Any], message: str):
    (published / "preprocessor_config.json").write_text(json.dumps({**PUBLISHED, **change}))
    with pytest.raises(ValueError, match=message) as told:
        load_checkpoint(published)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("strategy", ["letterbox", "resize-crop"])
def test_other_strategies_are_refused_unless_the_keys_say_that_they_do_nothing(strategy: str):
    plain = {key: value for key, value in PUBLISHED.items() if not key.startswith("tvf_")}
    with pytest.raises(ValueError, match=f"image_resize_strategy {strategy!r}"):
        PrismaticImageProcessor(**{**plain, "image_resize_strategy": strategy})
    image = picture(256)
    found = PrismaticImageProcessor(**{**PUBLISHED, "image_resize_strategy": strategy})(image)["pixel_values"][0]
    torch.testing.assert_close(found, by_torchvision(Image.fromarray(image)), rtol=0, atol=1e-6)


def test_an_image_processor_of_another_backbone_is_refused(published: Path):
    one = {key: value[:1] if isinstance(value, list) else value for key, value in PUBLISHED.items()}
    (published / "preprocessor_config.json").write_text(json.dumps(one))
    with pytest.raises(ValueError, match=r"224 pixels for each of 1 ViTs, config.json has image_sizes \[224, 224\]"):
        load_checkpoint(published)


def add_mark(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def test_byte_order_marks_are_read_over(published: Path):
    expected = load_checkpoint(published)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        add_mark(published / name)
    found = load_checkpoint(published)
    assert found.processor.image_processor.pixels == expected.processor.image_processor.pixels
    words = "In: What action should the robot take to turn on the stove?\nOut:"
    assert found.processor.tokenizer(words)["input_ids"] == expected.processor.tokenizer(words)["input_ids"]
    assert found.processor.tokenizer.pad_token == expected.processor.tokenizer.pad_token


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\n",
    "cut off": lambda content: content[: len(content) // 2],
    "of another kind": lambda _: b'{"version": "1.0", "model": 3}',
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_damaged_files_are_named(published: Path, name: str, damage: str):
    (published / name).write_bytes(DAMAGES[damage]((published / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{published}") as told:
        load_checkpoint(published)
    assert "\n" not in str(told.value) and (name in str(told.value) or damage == "of another kind")
