"""The tutorials' cells run one after another, as they do when the site is built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
CELLS = {
    page.stem: re.findall(r"```\{code-cell\} python\n(.*?)```", page.read_text(), re.DOTALL)
    for page in sorted(TUTORIALS.glob("*.md"))
}
NOTEBOOKS = [name for name, cells in CELLS.items() if cells]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_tutorial_runs_from_top_to_bottom(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    scope = {"__name__": "__main__"}
    for k, cell in enumerate(CELLS[name]):
        exec(compile(cell, f"{name}.md, cell {k + 1}", "exec"), scope)


def test_notebooks_name_a_kernel_and_all_code_is_in_cells_or_shown_alone() -> None:
    assert {"table", "text_classifier", "own_network", "own_method"} <= set(NOTEBOOKS)
    for name in NOTEBOOKS:
        text = (TUTORIALS / f"{name}.md").read_text()
        assert text.startswith("---\nfile_format: mystnb\nkernelspec:\n  name: python3\n")
        assert "```python" not in text
