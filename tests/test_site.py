"""The site: all pages are reached from the first, links lead somewhere, the picture shows all packages."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fimo

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts and "jupyter_execute" not in p.parts)
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_architecture", DOCS / "draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_code(page: Path) -> str:
    """Return a page without blocks and spans of code, roles kept."""
    text = re.sub(r"```(?!\{(?:toctree|include|glossary)).*?```", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"(\{\w+\})?`[^`\n]*`", lambda span: span[0] if span[1] else "", text)


def listed(page: Path) -> Iterator[Path]:
    """Yield the pages of a page's tables of contents."""
    for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            if line.strip() and not line.startswith(":"):
                yield (page.parent / f"{line.strip()}.md").resolve()


def test_every_page_is_reached_from_the_first_by_tables_of_contents() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        assert page.is_file(), page
        if page not in reached:
            reached.add(page)
            waiting += listed(page)
    assert reached == set(PAGES)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_pages_files_and_headings_that_there_are(name: str) -> None:
    page = DOCS / name
    text = without_code(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#", "mailto:")):
            assert (page.parent / target.split("#")[0]).exists(), target
    for role, target in re.findall(r"\{(doc|ref|term)\}`(?:[^`<]*<)?([^`>]+)>?`", text):
        if role == "doc":
            root = DOCS if target.startswith("/") else page.parent
            assert (root / f"{target.lstrip('/')}.md").is_file(), target
        elif role == "ref":
            assert any(f"({target})=\n" in other.read_text() for other in PAGES), target
        else:
            assert f"\n{target}\n  " in (DOCS / "concepts.md").read_text(), target


def test_links_of_the_front_page_lead_to_files() -> None:
    text = (ROOT / "README.md").read_text()
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith("http")]
    assert len(targets) > 5
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_the_picture_of_the_architecture_has_every_package(drawing: ModuleType) -> None:
    picture = (DOCS / "architecture.svg").read_text()
    assert {"engine", "methods", "errors"} <= drawing.packages().keys()
    missing = [name for name in drawing.packages() if f">{name}</text>" not in picture]
    assert missing == [], "draw it anew: python docs/draw_architecture.py"


def test_packages_are_drawn_above_all_that_they_import(drawing: ModuleType) -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"a", "e"}, "e": {"d"}}
    assert drawing.floors(graph) == {"a": 2, "b": 1, "c": 0, "d": 3, "e": 3}
    assert drawing.circles(graph) == {("d", "e")}
    assert drawing.arrows(graph) == {("a", "b"), ("b", "c"), ("d", "a"), ("d", "e"), ("e", "d")}


def test_every_method_is_on_the_page_that_chooses_one() -> None:
    page = (DOCS / "which_method.md").read_text()
    methods = [path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")]
    assert [name for name in methods if f"| `{name}` |" not in page] == []


def test_the_reference_has_every_public_name_and_every_method() -> None:
    page = (DOCS / "api" / "fimo.md").read_text()
    assert [name for name in fimo.__all__ if f":: fimo.{name}\n" not in page.replace("()", "")] == []
    page = (DOCS / "api" / "methods.md").read_text()
    targets = [
        re.findall(r"_target_: (\S+)", p.read_text())[0] for p in (ROOT / "conf" / "method").glob("*.yaml")
    ]
    assert [target for target in targets if f":: {target}\n" not in page] == []
