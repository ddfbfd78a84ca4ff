"""Classes and functions as their source has them: importing what they need takes seconds."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fimo.store.sources import version

Definition = ast.ClassDef | ast.FunctionDef


def with_bases(target: str) -> Iterator[Definition]:
    """Yield what a dotted path names, then its first base class, and so on, as far as sources are found."""
    while target:
        module, _, name = target.rpartition(".")
        tree = _parsed(module)
        body = [] if tree is None else tree.body
        found = [node for node in body if isinstance(node, Definition) and node.name == name]
        if not found or tree is None:
            return
        yield found[0]
        bases = [b.id for b in getattr(found[0], "bases", []) if isinstance(b, ast.Name)]
        target = _imported_as(tree, bases[0], module) if bases else ""


def arguments(target: str) -> list[str] | None:
    """Return the names of a function's or a class's arguments; None where it takes any, or can't be told."""
    for definition in with_bases(target):
        if definition.decorator_list:  # a dataclass, or a function that another one stands for
            return None
        inside = definition.body if isinstance(definition, ast.ClassDef) else [definition]
        for node in inside:
            if isinstance(node, ast.FunctionDef) and (node is definition or node.name == "__init__"):
                if node.args.kwarg is not None or node.decorator_list:
                    return None
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                return names if node is definition else names[1:]
    return None


def libraries(config: Any) -> dict[str, str]:
    """Return the versions of other libraries' modules that compute a configuration's methods.

    Args:
        config: plain containers, nested, or flat with dotted names.
    """
    found: dict[str, str] = {}
    for target in _targets(config):
        for definition in with_bases(target):
            for line in definition.body:
                names = line.targets if isinstance(line, ast.Assign) else []
                if any(isinstance(name, ast.Name) and name.id == "packages" for name in names):
                    modules = [m for ms in ast.literal_eval(line.value).values() for m in ms]  # type: ignore[attr-defined]
                    found |= {module: version(module) for module in modules}
    return found


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for name, entry in node.items():
            if str(name).rpartition(".")[2] == "_target_":
                yield str(entry)
            yield from _targets(entry)
    elif isinstance(node, list | tuple):
        for entry in node:
            yield from _targets(entry)


@functools.cache
def _parsed(module: str) -> ast.Module | None:
    package, *inside = module.split(".")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        files = [] if inside or spec.origin is None else [Path(spec.origin)]
    else:
        places = [Path(place, *inside) for place in spec.submodule_search_locations]
        files = [f for place in places for f in (place.with_suffix(".py"), place / "__init__.py")]
    found = [file for file in files if file.is_file()]
    return ast.parse(found[0].read_text()) if found else None


def _imported_as(tree: ast.Module, name: str, module: str) -> str:
    """Return the dotted path of a name in a module: what it imports it from, else its own."""
    for line in tree.body:
        if isinstance(line, ast.ImportFrom) and line.module and not line.level:
            for alias in line.names:
                if (alias.asname or alias.name) == name:
                    return f"{line.module}.{alias.name}"
    return f"{module}.{name}"
