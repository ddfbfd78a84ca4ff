"""The README's and the documents' Python examples run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {
    f"{page.relative_to(ROOT)}-{k}": block
    for page in PAGES
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


@pytest.mark.parametrize("name", BLOCKS)
def test_an_example_runs_as_it_stands(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": "example"})


def test_the_readme_names_every_group() -> None:
    page = (ROOT / "README.md").read_text()
    for group in (
        "dataset",
        "model",
        "method",
        "trainer",
        "further_training",
        "evaluation",
        "logger",
        "experiment",
    ):
        assert f"| `{group}` |" in page
