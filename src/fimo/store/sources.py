"""The source of modules and of what they import, read without importing anything.

A result depends on the module that computes it and on every module of this package that that one imports,
itself or through others, also inside functions; and in the same way on a user's own modules. Installed
packages and Python's own stand under their versions.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

PACKAGE = "fimo"
FOLDER = Path(__file__).parents[1]

Origin = Literal["package", "installed", "main", "user"]


def origin(module: str | None) -> Origin:
    """Return whose a module is: this package's, an installed one, the script or session, or a user's own."""
    name = str(module or "builtins")
    top = name.partition(".")[0]
    if top == PACKAGE:
        return "package"
    if top in ("__main__", "__mp_main__"):
        return "main"
    if top in sys.stdlib_module_names:
        return "installed"
    return "installed" if _installed(top) else "user"


@functools.cache
def package_code(*modules: str) -> str:
    """Return a hash of the source of modules of this package, and of all that they import from it."""
    return PACKAGE_SOURCES.code(*modules)


def user_code(module: str) -> str:
    """Return a hash of the source of a user's module, and of all that it imports but installed packages."""
    return Sources().code(module)


def version(module: str) -> str:
    """Return the version of the distribution that a module is installed from; empty where there is none."""
    top = module.partition(".")[0]
    names = _distributions().get(top, ())
    return " ".join(f"{name}=={importlib.metadata.version(name)}" for name in sorted(set(names)))


class Sources:
    """Files of modules by name, read when asked for.

    Args:
        folder: of this package; another than the running one's for a copy of it.
        once: read each file once, so that an edit of a file that was imported before is not taken for the
            code that runs.
    """

    def __init__(self, folder: Path = FOLDER, once: bool = False) -> None:
        self.folder = folder
        self._read: dict[Path, bytes] | None = {} if once else None

    def code(self, *modules: str) -> str:
        """Return a hash of the source of modules and of all that they import."""
        digest = hashlib.sha256()
        for name in self.with_imports(modules):
            path = self.path(name)
            assert path is not None
            digest.update(f"{name}:{hashlib.sha256(self.text(path)).hexdigest()};".encode())
        return digest.hexdigest()[:24]

    def everything(self) -> str:
        """Return a hash of every module of the package."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*.py")):
            digest.update(f"{path.relative_to(self.folder)}:".encode())
            digest.update(hashlib.sha256(self.text(path)).digest())
        return digest.hexdigest()[:24]

    def with_imports(self, modules: Iterable[str]) -> list[str]:
        """Return modules and all that they import of this package and of the user's own, sorted."""
        found: set[str] = set()
        waiting = list(modules)
        while waiting:
            name = waiting.pop()
            if name in found or self.path(name) is None:
                continue
            found.add(name)
            waiting += self.imports(name)
        return sorted(found)

    def imports(self, name: str) -> list[str]:
        """Return what one module imports, of this package and of the user's own."""
        path = self.path(name)
        if path is None or path.suffix != ".py":
            return []
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        try:
            tree = _parsed(self.text(path))
        except (SyntaxError, ValueError):  # importing it says so
            return []
        return sorted({m for node in _imports(tree.body) for m in self._named(node, package)})

    def text(self, path: Path) -> bytes:
        """Return a file's content."""
        if self._read is None:
            return path.read_bytes()
        if path not in self._read:
            self._read[path] = path.read_bytes()
        return self._read[path]

    def path(self, name: str) -> Path | None:
        """Return the file of a module; None where it is installed, or not there."""
        if origin(name) in ("installed", "main"):
            return None
        top, *rest = name.split(".")
        if top == PACKAGE:
            return _file(self.folder.joinpath(*rest))
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded:
            return Path(loaded)
        spec = importlib.machinery.PathFinder.find_spec(top)  # does not import, as find_spec of parts would
        if spec is None:
            return None
        if not rest:
            return Path(spec.origin) if spec.origin else None
        for folder in spec.submodule_search_locations or ():
            if (path := _file(Path(folder).joinpath(*rest))) is not None:
                return path
        return None

    def _named(self, node: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
        """Yield the modules that an import statement names."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                yield from self._lazy(alias.name).values()
            return
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        homes = self._lazy(base)
        for alias in node.names:
            inside = f"{base}.{alias.name}"
            if alias.name in homes:
                yield homes[alias.name]
            elif self.path(inside) is not None:
                yield inside
        yield base

    def _lazy(self, name: str) -> dict[str, str]:
        """Return the modules from which a package takes names when they are first used, by name.

        Such a package has a ``__getattr__``, and tells type checkers where its names come from.
        """
        path = self.path(name)
        if path is None or path.name != "__init__.py":
            return {}
        tree = _parsed(self.text(path))
        if not any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body):
            return {}
        checked = [n for n in tree.body if isinstance(n, ast.If) and _is_type_checking(n.test)]
        return {
            alias.asname or alias.name: node.module
            for block in checked
            for node in _imports(block.body)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }


PACKAGE_SOURCES = Sources(once=True)
"""This package as it is in this process."""


def _file(path: Path) -> Path | None:
    """Return the file of a module whose path lacks its ending."""
    for candidate in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@functools.lru_cache(maxsize=512)
def _parsed(text: bytes) -> ast.Module:
    return ast.parse(text)


def _imports(body: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements that running a module may reach, in functions too."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and (_is_type_checking(node.test) or _is_main(node.test)):
            yield from _imports(node.orelse)
        else:
            for name in (
                "body",
                "handlers",
                "orelse",
                "finalbody",
                "cases",
            ):  # no expression holds a statement
                if isinstance(inside := getattr(node, name, None), list):  # a lambda's body is none
                    yield from _imports(inside)


def _is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in (getattr(test, "id", None), getattr(test, "attr", None))


def _is_main(test: ast.expr) -> bool:
    return isinstance(test, ast.Compare) and getattr(test.left, "id", None) == "__name__"


@functools.cache
def _installed(top: str) -> bool:
    """Return whether a top-level module is installed rather than the user's own."""
    module = sys.modules.get(top)
    spec = getattr(module, "__spec__", None) or importlib.machinery.PathFinder.find_spec(top)
    places = [str(p) for p in (getattr(module, "__file__", None), getattr(spec, "origin", None)) if p]
    places += list(getattr(spec, "submodule_search_locations", None) or ())
    if spec is None and not places:  # built in, or made in memory
        return module is not None and top in sys.builtin_module_names
    own = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    packages = {"site-packages", "dist-packages"}
    return any(
        packages & set(Path(place).parts) or any(Path(place).is_relative_to(folder) for folder in own)
        for place in places
    )


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())
