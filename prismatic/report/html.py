"""A report as one HTML page that loads nothing from elsewhere, so that it can be mailed and opened offline."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prismatic.report.data import Chart, ReportData


def render_html(data: ReportData) -> str:
    """The page as text. All strings in `data` are escaped; charts are drawn here."""
    environment = Environment(
        loader=PackageLoader("prismatic.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["anchor"] = _anchor
    environment.filters["drawing"] = _drawing
    return environment.get_template("template.html").render(data=data)


def _anchor(title: str) -> str:
    """`What the policy keeps` -> `what-the-policy-keeps`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _drawing(chart: Chart) -> Markup | None:
    svg = chart.svg()
    return None if svg is None else Markup(svg)


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the page to `path`, atomically: readers see the old page or the new one."""
    return write_atomically(Path(path), render_html(data))


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file so that readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path
