"""Draw which package imports which, as the picture of the page on architecture: from the imports themselves.

    python docs/draw_architecture.py     # writes docs/architecture.svg

A package stands above all that it imports; an arrow that other arrows imply is left out, and so is an import
within a function that points up. Packages that import each other share a row, with an arrow both ways.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from textwrap import wrap

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "fimo"

Graph = Mapping[str, set[str]]


def packages(root: Path = PACKAGE) -> dict[str, str]:
    """Return the packages and loose modules of ``fimo``, each with the first line of its docstring."""
    found = {}
    for path in sorted(root.iterdir()):
        module = path / "__init__.py" if path.is_dir() else path
        name = path.name if path.is_dir() else path.stem
        if module.suffix == ".py" and module.is_file() and not name.startswith("_"):
            text = ast.get_docstring(ast.parse(module.read_text())) or ""
            line = text.split("\n", 1)[0].replace("``", "").rstrip(".").removeprefix(f"The {name}: ")
            found[name] = line[:1].upper() + line[1:]
    return found


def imports(root: Path = PACKAGE) -> dict[str, set[str]]:
    """Return for each package the others that it imports; within functions only where down."""
    names = packages(root)
    graph: dict[str, set[str]] = {name: set() for name in names}
    late: dict[str, set[str]] = {name: set() for name in names}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).parts[0].removesuffix(".py")
        if name in graph:
            module, others = ast.parse(path.read_text()), names.keys() - {name}
            graph[name] |= set(_imported(module, within=False)) & others
            late[name] |= set(_imported(module, within=True)) & others
    for name, found in late.items():
        graph[name] |= {other for other in found if name not in reachable(graph, other)}
    return graph


def _imported(node: ast.AST, within: bool) -> Iterator[str]:
    """Yield the packages of ``fimo`` that a module imports, ``within`` functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.FunctionDef) and not within:
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "fimo":
            inner = (child.module or "").split(".")[1:]
            yield from inner[:1] or [alias.name for alias in child.names]
        elif isinstance(child, ast.Import):
            yield from (a.name.split(".")[1] for a in child.names if a.name.startswith("fimo."))
        yield from _imported(child, within)


def reachable(graph: Graph, start: str) -> set[str]:
    """Return all that a package imports, directly or through others."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def circles(graph: Graph) -> set[tuple[str, str]]:
    """Return the pairs of packages that import each other, directly or through others."""
    below = {name: reachable(graph, name) for name in graph}
    return {(a, b) for a in graph for b in below[a] if a < b and a in below[b]}


def floors(graph: Graph) -> dict[str, int]:
    """Return the floor of each package: 0 where it imports none, else one above all that it does."""
    below = {name: reachable(graph, name) for name in graph}
    height: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in height:
            lower = [other for other in below[name] if name not in below[other]]
            height[name] = 1 + max((floor(other) for other in lower), default=-1)
        return height[name]

    return {name: floor(name) for name in graph}


def arrows(graph: Graph) -> set[tuple[str, str]]:
    """Return the imports that no other imports imply."""
    below = {name: reachable(graph, name) for name in graph}
    return {
        (a, b)
        for a in graph
        for b in graph[a]
        if not any(b in below[c] for c in graph[a] if c != b and c not in below[b] and a not in below[c])
    }


WIDTH, HEIGHT, GAP, ROW, MARGIN = 214, 62, 26, 102, 20  # pixels


def draw(root: Path = PACKAGE) -> str:
    """Return the picture as SVG."""
    words, graph = packages(root), imports(root)
    floor, drawn = floors(graph), arrows(graph)
    rows = [[n for n in graph if floor[n] == k] for k in range(max(floor.values()), -1, -1)]
    place = _places(rows, drawn)
    full = max(x for x, _ in place.values()) + WIDTH + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full:.0f} {len(rows) * ROW + MARGIN}" '
        'font-family="system-ui, sans-serif" role="img" aria-label="Packages and what they import">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto-start-reverse"><path d="M0,0L8,4L0,8z" fill="#7a8594"/></marker></defs>',
        '<rect width="100%" height="100%" rx="10" fill="#fff"/>',
    ]
    for above, below in sorted(drawn):
        parts.append(_arrow(place[above], place[below]))
    for name, (x, y) in sorted(place.items()):
        parts.append(_box(name, words[name], x, y))
    return "\n".join([*parts, "</svg>", ""])


def _places(rows: list[list[str]], drawn: set[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Return each box's upper left corner: rows centred, boxes ordered by what they hang on."""
    widest = max(map(len, rows))
    place: dict[str, tuple[float, float]] = {}
    for k, row in enumerate(rows):
        above = {n: [place[a][0] for a, b in drawn if b == n and a in place] for n in row}
        row = sorted(row, key=lambda n: (sum(above[n]) / len(above[n]) if above[n] else 0.0, n))
        start = MARGIN + (widest - len(row)) * (WIDTH + GAP) / 2
        for i, name in enumerate(row):
            place[name] = (start + i * (WIDTH + GAP), MARGIN + k * ROW)
    return place


def _arrow(above: tuple[float, float], below: tuple[float, float]) -> str:
    x, y, u, v = above[0] + WIDTH / 2, above[1] + HEIGHT, below[0] + WIDTH / 2, below[1]
    if above[1] == below[1]:  # of one circle
        y, v, middle = above[1] + HEIGHT, below[1] + HEIGHT, above[1] + HEIGHT + 24
        path = f"M{x:.0f},{y:.0f}C{x:.0f},{middle:.0f} {u:.0f},{middle:.0f} {u:.0f},{v:.0f}"
    else:
        bend = min(0.5 * (v - y), 60)
        path = f"M{x:.0f},{y:.0f}C{x:.0f},{y + bend:.0f} {u:.0f},{v - bend:.0f} {u:.0f},{v:.0f}"
    return f'<path d="{path}" fill="none" stroke="#7a8594" stroke-width="1.2" marker-end="url(#tip)"/>'


def _box(name: str, words: str, x: float, y: float) -> str:
    lines = wrap(words, 38, max_lines=2, placeholder=" …")
    text = "".join(
        f'<text x="{x + WIDTH / 2:.0f}" y="{y + 35 + 13 * k:.0f}" font-size="10" fill="#3d4752" '
        f'text-anchor="middle">{escape(line)}</text>'
        for k, line in enumerate(lines)
    )
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3f9" '
        f'stroke="#4a6d96"/><text x="{x + WIDTH / 2:.0f}" y="{y + 19:.0f}" font-size="13.5" '
        f'font-weight="600" fill="#1d2a38" text-anchor="middle">{escape(name)}</text>{text}'
    )


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(draw())
