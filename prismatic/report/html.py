"""A report as one HTML page that loads nothing from elsewhere, so that it can be mailed and opened offline."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prismatic.atomic_files import write_atomically
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
    return write_atomically(path, render_html(data))
