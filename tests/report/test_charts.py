import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from report_page import EVIL
from scipy import stats

from prismatic.report.charts import BandChart, RateBars, StackedBars, band_of
from prismatic.report.figures import Curve

SVG = "{http://www.w3.org/2000/svg}"


def groups(svg: str, name: str) -> list[ElementTree.Element]:
    """The drawing's groups whose id ends in `name` and a number, in order."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return [group for group in found if re.search(rf"-{name}_\d+$", group.get("id", ""))]


def places(group: ElementTree.Element) -> list[tuple[float, float]]:
    """All points of a group's paths, (x, y)."""
    text = " ".join(path.get("d", "") for path in group.iter(f"{SVG}path"))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", text)]


def test_intervals_are_drawn_where_scipy_has_them() -> None:
    svg = RateBars("Bars", ["a", "b", "none"], {"s": [(3, 4), (0, 5), (0, 0)]}).svg()
    assert svg is not None
    marks = [tick.find(f".//{SVG}use") for tick in groups(svg, "xtick")]
    x = [float(mark.get("x", "nan")) for mark in marks if mark is not None]
    lines = groups(svg, "LineCollection")[0]
    drawn = np.array([place[0] for place in places(lines)]).reshape(2, 2)
    for line, (successes, trials) in zip(drawn, [(3, 4), (0, 5)], strict=True):
        expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert (line - x[0]) / (x[5] - x[0]) == pytest.approx([expected.low, expected.high], abs=2e-3)
    assert "3/4" in svg and "0/5" in svg and "0/0" not in svg


def test_a_band_is_taken_over_those_that_are_long_enough() -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(5, 30, length).tolist() for length in (3, 7, 7, 1, 12)]
    band = band_of(sequences)
    assert band.count.tolist() == [5, 4, 4, 3, 3, 3, 3, 1, 1, 1, 1, 1]
    for place in range(12):
        column = [sequence[place] for sequence in sequences if len(sequence) > place]
        assert band.mean[place] == pytest.approx(sum(column) / len(column))
        assert band.low[place] == pytest.approx(stats.scoreatpercentile(column, 10))
        assert band.high[place] == pytest.approx(stats.scoreatpercentile(column, 90))
    assert band_of([]).mean.size == 0


def test_nothing_to_draw_draws_nothing() -> None:
    assert RateBars("", [], {"s": []}).svg() is None and RateBars("", ["a"], {"s": [(0, 0)]}).svg() is None
    chart = BandChart("", {"s": band_of([])}, "policy query", "tokens")
    assert chart.svg() is None and chart.table() is None
    assert StackedBars("", [], {}, "ms").svg() is None


def test_a_query_has_its_second() -> None:
    chart = BandChart("Kept", {"s": band_of([list(range(61))])}, "policy query", "tokens", seconds_per_count=0.5)
    svg = chart.svg()
    assert svg is not None and ">seconds<" in svg and ">30<" in svg  # the 61st query comes after 60 times 0.5 s


def test_the_parts_of_a_bar_lie_end_to_end() -> None:
    svg = StackedBars("Times", ["a"], {"vision": [3.0], "llm": [4.5], "rest": [0.5]}, "ms").svg()
    assert svg is not None and ">8.0<" in svg
    patches = [sorted({x for x, _ in places(group)}) for group in groups(svg, "patch")]
    bars = [ends for ends in patches if len(ends) == 2][2:5]  # behind the figure and the axes
    assert bars[0][1] == pytest.approx(bars[1][0]) and bars[1][1] == pytest.approx(bars[2][0])
    widths = [right - left for left, right in bars]
    assert widths[1] / widths[0] == pytest.approx(1.5, abs=1e-3) and widths[2] / widths[0] == pytest.approx(
        1 / 6, abs=1e-3
    )


def test_ids_differ_between_charts_and_words_are_escaped() -> None:
    first, second = (RateBars(title, [EVIL], {EVIL: [(1, 2)], "b": [(1, 2)]}).svg() for title in ("one", "two"))
    assert first is not None and second is not None
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', first)) and "<b>" not in first
    for used in re.findall(r'href="#([^"]+)"', first) + re.findall(r"url\(#([^)]+)\)", first):
        assert used in ids[0]
    assert EVIL in [element.text for element in ElementTree.fromstring(first).iter(f"{SVG}text")]


@pytest.mark.parametrize("label", ["_backup", "__", "$x", "plain"])
def test_every_name_is_in_the_legend(label: str) -> None:
    names = {label: 3.0, "other": 4.0}
    band = band_of([[3, 2, 1]])
    metrics = [{"step": step, **names} for step in range(80)]
    charts = [
        RateBars("t", ["a"], dict.fromkeys(names, [(1, 2)])),
        RateBars("t", ["a"], {label: [(0, 0)], "other": [(1, 2)]}),
        BandChart("t", dict.fromkeys(names, band), "policy query", "tokens"),
        StackedBars("t", ["a"], {name: [value] for name, value in names.items()}, "ms"),
        Curve("t", {name: name for name in names}, metrics),
    ]
    for chart in charts:
        svg = chart.svg()
        assert svg is not None
        words = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
        assert words.count(label) == words.count("other") == 1


def test_charts_are_described_in_words() -> None:
    assert "a: 3 of 4" in RateBars("Bars", ["a"], {"s": [(3, 4)]}).description
    assert "vision 3.0" in StackedBars("Times", ["a"], {"vision": [3.0]}, "ms").description
    assert (
        "8.0 at the first policy query"
        in BandChart("Kept", {"s": band_of([[8, 6]])}, "policy query", "tokens").description
    )
