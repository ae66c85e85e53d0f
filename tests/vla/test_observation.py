"""What callers hand over: forms that are read, remedies of what is refused, doubts that are said once."""

import numpy as np
import pytest
import torch
from PIL import Image

from prismatic.vla.normalization import fit_statistics
from prismatic.vla.observation import ObservationDoubts, read_observation
from prismatic.vla.robots import LIBERO

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
STATE = np.array([0.1, 0.2, 0.9, 3.1, 0.0, -0.2, 0.04, -0.04])


def given(**change):
    return {"full_image": PICTURES[0], "wrist_image": PICTURES[1], "state": STATE, **change}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PICTURES[0] / 255, r"float64 \(6, 5, 3\); expected uint8 .*\(255 \* image\).round"),
        (PICTURES[0].astype(np.int64), r"int64 .*image.astype\(np.uint8\)"),
        (PICTURES[0].transpose(2, 0, 1), r"uint8 \(3, 6, 5\).*np.transpose\(image, \(1, 2, 0\)\)$"),
        (torch.rand(3, 6, 5), r"float32 \(3, 6, 5\).*np.transpose.*; values in 0..1"),
        (PICTURES[:1], r"\(1, 6, 5, 3\).*image\[0\]"),
        (np.zeros((6, 5, 4), np.uint8), r"\(6, 5, 4\).*alpha"),
        (PICTURES[0, ..., 0], r"\(6, 5\).*grey"),
        (Image.new("RGBA", (5, 6)), r"mode 'RGBA'; expected RGB: image.convert\('RGB'\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        ([[[1, 2, 3], [4, 5]]], "full_image.*, a list, makes no array"),
        ([[[1, 2, 300]]], r"int64 \(1, 1, 3\)"),
        (None, "full_image.*object"),
        (b"JPEG", "full_image"),
    ],
)
def test_pictures_that_cannot_be_meant_are_refused_with_a_remedy(image, message):
    with pytest.raises(ValueError, match=message):
        read_observation(given(full_image=image), LIBERO, 2, True)


@pytest.mark.parametrize("form", ["np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=-1)", "image[..., :3]"])
def test_remedies_work(form):
    image = PICTURES[0, ..., 0] if "repeat" in form else np.concatenate([PICTURES[0], PICTURES[1][..., :1]], -1)
    repaired = eval(form, {"np": np, "image": image})
    assert read_observation(given(full_image=repaired), LIBERO, 2, True).images["full_image"].shape == (6, 5, 3)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (STATE[None], r"shape \(1, 8\); expected \(8,\) numbers: observation\['state'\]\[0\]"),
        (list("abcdefgh"), "expected \\(8,\\) numbers"),
        (None, "state.*object"),
        ([0.0] * 7 + [float("inf")], "NaN or infinity"),
        (STATE.astype(complex), "complex128"),
    ],
)
def test_states_that_cannot_be_meant_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        read_observation(given(state=state), LIBERO, 2, True)


def test_what_the_model_does_not_read_is_not_looked_at():
    read = read_observation({"full_image": PICTURES[0], "state": "broken"}, LIBERO, 1, False)
    assert list(read.images) == ["full_image"] and read.state is None
    with pytest.raises(ValueError, match="an observation is a mapping with the keys .*, but a list came"):
        read_observation([PICTURES[0]], LIBERO, 1, False)


@pytest.fixture
def statistics():
    rng = np.random.default_rng(0)
    states = STATE + 0.2 * rng.uniform(-1, 1, (100, 8))
    states[:, 6] = 0.04  # never varies
    return fit_statistics(rng.normal(size=(100, 7)), states, LIBERO.action_mask, 3)["proprio"]


def doubts_of(statistics, caplog, **change) -> list[str]:
    caplog.clear()
    ObservationDoubts("state", statistics).look(read_observation(given(**change), LIBERO, 2, True))
    return [record.getMessage() for record in caplog.records]


def test_ordinary_observations_raise_no_doubt(statistics, caplog):
    assert doubts_of(statistics, caplog) == []
    assert doubts_of(statistics, caplog, state=STATE + 0.5) == [], "a little outside is a new place, not another unit"
    assert doubts_of(statistics, caplog, state=STATE + np.eye(8)[6]) == [], "what never varied is not read"
    assert doubts_of(None, caplog, state=1000 * STATE) == []
    dark = np.zeros((6, 5, 3), np.uint8)
    dark[2, 2] = 60
    assert doubts_of(statistics, caplog, full_image=dark) == []


def test_millimetres_degrees_and_other_orders_are_doubted(statistics, caplog):
    metres = STATE.copy()
    metres[:3] *= 1000
    (said,) = doubts_of(statistics, caplog, state=metres)
    assert "dimensions [0, 1, 2]" in said and "900 in dimension 2, where it was 0.7" in said and "metres" in said
    degrees = STATE.copy()
    degrees[3] = np.rad2deg(degrees[3])
    (said,) = doubts_of(statistics, caplog, state=degrees)
    assert "dimensions [3]" in said
    assert doubts_of(statistics, caplog, state=STATE[[3, 4, 5, 0, 1, 2, 6, 7]])


@pytest.mark.parametrize("level", [0, 128, 255])
def test_pictures_of_nothing_are_doubted(statistics, caplog, level):
    (said,) = doubts_of(statistics, caplog, wrist_image=np.full((6, 5, 3), level, np.uint8))
    assert f"'wrist_image'] shows nothing: all its values are between {level} and {level}" in said


def test_equal_pictures_are_doubted(statistics, caplog):
    (said,) = doubts_of(statistics, caplog, wrist_image=PICTURES[0].copy())
    assert "observation['full_image'] and observation['wrist_image'] are the same picture" in said
