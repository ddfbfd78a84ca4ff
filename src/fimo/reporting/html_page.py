"""Pages of one file: templates, style, scripts and plotly.js put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline

from fimo.reporting.numbers import ABSENT, MINUS, Unit, duration, number
from fimo.store.files import written_aside


def write_page(
    template: str, path: Path, data: Mapping[str, Any], scripts: Sequence[str] = (), **context: Any
) -> Path:
    """Write a page that opens offline.

    Args:
        template: of the folder ``page``; a script of the same name goes with it.
        data: what the script reads.
        scripts: others of the folder that come before it.
        context: what the template says.

    Returns:
        its path.
    """
    page = files("fimo.reporting") / "page"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (page / name).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # columns keep their order
    environment.filters |= {"number": number, "duration": duration, "decimals": decimals}
    environment.globals["unit_of"] = Unit.of
    scripts = ("shared.js", "tables.js", *scripts, template.replace(".html", ".js"))
    html = environment.get_template(template).render(
        data=data,
        plotly=plotly.offline.get_plotlyjs(),
        style=(page / "report.css").read_text("utf-8"),
        script="\n".join((page / name).read_text("utf-8") for name in scripts),
        **context,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(html, encoding="utf-8")
    path.chmod(0o644)
    return path


def decimals(value: float | None, digits: int = 3) -> str:
    """Return an agreement with fixed decimals, so that a column lines up."""
    return ABSENT if value is None or value != value else f"{value:.{digits}f}".replace("-", MINUS)
