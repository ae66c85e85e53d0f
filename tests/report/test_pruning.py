"""Maps and charts of what was kept: what is drawn, read back off the figures, against loops over the masks."""

import functools
import io
import operator

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from prismatic.pictures.trace import PruningTrace
from prismatic.report import pruning
from prismatic.vla.crop import CROP_AREA

CAMERAS = ("full_image", "wrist_image")


def made_up(queries: int, seed: int = 0, **changes: object) -> PruningTrace:
    rng = np.random.default_rng(seed)
    images = tuple(rng.integers(0, 256, (queries, 24, 24, 3), dtype=np.uint8) for _ in CAMERAS)
    kept = rng.uniform(size=(queries, 2 * 9)) < 0.4
    kept[:, 0] = True
    scores = rng.normal(size=kept.shape).astype(np.float32) + 2 * kept
    parts = {"title": f"task {seed}", "cameras": CAMERAS, "images": images, "kept": kept, "scores": scores}
    return PruningTrace(**{**parts, "steps": 8 * np.arange(queries), **changes})  # type: ignore[arg-type]


def sums(traces: list[PruningTrace], size: int = 32) -> pruning.PatchSums:
    return functools.reduce(operator.add, [pruning.PatchSums.of(trace, size) for trace in traces])


def test_shares_and_scores_are_means_over_all_queries() -> None:
    traces = [made_up(3), made_up(7, seed=1)]
    shares, scores = sums(traces).keep_shares, sums(traces).mean_scores
    assert shares.shape == scores.shape == (2, 3, 3)
    for camera in range(2):
        for row in range(3):
            for column in range(3):
                token = 9 * camera + 3 * row + column
                flags = [bool(query[token]) for trace in traces for query in trace.kept]
                values = [float(query[token]) for trace in traces for query in trace.scores]  # type: ignore[union-attr]
                assert shares[camera, row, column] == pytest.approx(sum(flags) / 10)
                assert scores[camera, row, column] == pytest.approx(sum(values) / 10)


def test_mean_pictures_are_grey_means() -> None:
    traces = [made_up(2), made_up(3, seed=1)]
    pictures = sums(traces, size=24).mean_pictures
    stack = np.concatenate([trace.images[1] for trace in traces]).astype(float)
    np.testing.assert_allclose(pictures[1], stack.mean(axis=(0, 3)) / 255)


@pytest.mark.parametrize("crop", [False, True])
def test_the_map_lies_over_what_the_policy_saw(crop: bool) -> None:
    traces = [made_up(5, center_crop=crop)]
    figure = pruning.keep_map(sums(traces), "a title")
    panels, bar = figure.axes[:4], figure.axes[4]
    for camera, axes in enumerate(panels[1::2]):
        (picture,), (patches,) = panels[2 * camera].images, axes.images
        assert panels[2 * camera].get_title() == f"{CAMERAS[camera]}: mean picture"
        np.testing.assert_array_equal(np.asarray(patches.get_array()), sums(traces).keep_shares[camera])
        left, right, bottom, top = patches.get_extent()
        assert (right - left) * (bottom - top) == pytest.approx(CROP_AREA if crop else 1.0)
        assert left + right == pytest.approx(1) and picture.get_extent() == [0, 1, 1, 0]
        expected = f"{CAMERAS[camera]}: {traces[0].grids[:, camera].sum() / 5:.1f} of 9 patches per policy query"
        assert axes.get_title() == expected
    assert "share of policy queries" in bar.get_ylabel() and bar.get_ylim() == (0, 1)
    with Image.open(io.BytesIO(pruning.figure_png(figure))) as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 1000


def test_every_camera_has_its_own_scale_of_scores() -> None:
    trace = made_up(4)
    figure = pruning.score_map(sums([trace]), "a title")
    for camera, axes in enumerate(figure.axes[1:4:2]):
        values = sums([trace]).mean_scores[camera]
        assert axes.images[0].get_clim() == pytest.approx((values.min(), values.max()))
    with pytest.raises(ValueError, match="no scores: pruners other than"):
        pruning.score_map(sums([made_up(4), made_up(4, scores=None)]), "a title")


def test_colours_are_those_of_the_bar() -> None:
    """What stands in the file where a patch is, read back through the colour map."""
    trace = made_up(5)
    figure, values = pruning.keep_map(sums([trace]), "a title"), sums([trace]).keep_shares
    with Image.open(io.BytesIO(pruning.figure_png(figure))) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    colours = (255 * matplotlib.colormaps[pruning.COLOUR_MAP](np.linspace(0, 1, 256))[:, :3]).round()
    for camera, axes in enumerate(figure.axes[1:4:2]):
        for row in range(3):
            for column in range(3):
                x, y = axes.transData.transform(((column + 0.4) / 3, (row + 0.4) / 3)) * pruning.DPI / figure.dpi
                found = pixels[pixels.shape[0] - round(y), round(x)].astype(float)
                level = np.abs(colours - found).sum(axis=1).argmin() / 255
                assert level * values.max() == pytest.approx(values[camera, row, column], abs=0.01)


def test_maps_refuse_what_does_not_fit_together() -> None:
    small = made_up(2, kept=np.ones((2, 8), dtype=bool), scores=None)
    for other in (small, made_up(2, center_crop=True), made_up(2, cameras=("a", "b"))):
        with pytest.raises(ValueError, match="one map needs episodes of equal cameras"):
            sums([made_up(2), other])


def test_the_chart_draws_counts_and_the_spread_of_scores() -> None:
    trace = made_up(6)
    counts, scores = pruning.kept_chart(trace).axes
    labels = [text.get_text() for text in counts.get_legend().get_texts()]
    drawn = {label: line.get_ydata().tolist() for label, line in zip(labels, counts.lines, strict=True)}
    halves = {"all cameras": slice(None), "full_image": slice(9), "wrist_image": slice(9, None)}
    assert drawn == {name: [int(row[part].sum()) for row in trace.kept] for name, part in halves.items()}
    assert counts.lines[0].get_xdata().tolist() == [0, 8, 16, 24, 32, 40]
    assert trace.scores is not None
    for line, mask in zip(scores.lines, (trace.kept, ~trace.kept), strict=True):
        expected = [np.median(row[chosen]) for row, chosen in zip(trace.scores, mask, strict=True)]
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-6)


def test_the_chart_without_scores_or_without_pruning() -> None:
    assert len(pruning.kept_chart(made_up(3, scores=None)).axes) == 1
    everything = made_up(3, kept=np.ones((3, 18), dtype=bool))
    assert [line.get_label() for line in pruning.kept_chart(everything).axes[1].lines] == ["kept tokens"]


def test_many_episodes_are_not_named() -> None:
    few, many = [made_up(3, seed) for seed in range(2)], [made_up(3, seed) for seed in range(9)]
    mean = np.mean([row.sum() for trace in few for row in trace.kept])
    figure = compared(few, ["_a", "b"])
    assert legend(figure) == ["_a", "b", f"mean of all queries: {mean:.1f}"]
    for line, trace in zip(figure.axes[0].lines[:2], few, strict=True):
        assert line.get_ydata().tolist() == [int(row.sum()) for row in trace.kept]
    assert figure.axes[0].get_ylabel() == "tokens kept of 18"
    figure = compared(many, [str(number) for number in range(9)])
    assert len(figure.axes[0].lines) == 10 and [label[:4] for label in legend(figure)] == ["mean"]


def compared(traces: list[PruningTrace], names: list[str]) -> Figure:
    pairs = zip(names, traces, strict=True)
    return pruning.compare_chart({name: (trace.steps, trace.kept.sum(axis=1)) for name, trace in pairs}, 18)


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def test_words_are_not_read_as_formulas() -> None:
    words = r"lift the $10 bowl {of $\bad"
    trace = made_up(3, title=words, cameras=("_a", "$b$"))
    for figure in (pruning.keep_map(sums([trace]), words), pruning.kept_chart(trace), compared([trace], [words])):
        assert pruning.figure_png(figure)  # an unfinished formula is an error when it is drawn
    labels = pruning.kept_chart(trace).axes[0].get_legend().get_texts()
    assert [label.get_text() for label in labels] == ["all cameras", "_a", "$b$"]
