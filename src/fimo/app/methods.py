"""``fimo methods``: which methods there are, what each needs, costs, and when to use it.

What a method says of itself is read from its source: importing all of them takes seconds.
"""

from __future__ import annotations

import argparse
import ast
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf

from fimo.app.definitions import Definition, with_bases
from fimo.app.search_path import SearchPath
from fimo.errors import InputError, nearest
from fimo.methods.catalogue import packaged_conf, without_markup
from fimo.reporting.plain_text import table

WIDEST = 10_000
"""Columns where the output is no terminal: nothing is cut."""


def console(arguments: Sequence[str]) -> NoReturn:
    """Run ``fimo methods``; ends the process."""
    parser = argparse.ArgumentParser("fimo methods", description="Which methods there are; one's settings.")
    parser.add_argument("name", nargs="?", help="of a method whose settings are shown")
    parser.add_argument("--config-dir", "-cd", help="folder of your own groups, as in a run")
    given = parser.parse_args(list(arguments))
    try:
        own = [] if given.config_dir is None else ["--config-dir", given.config_dir]
        files = SearchPath.of(own, packaged_conf()).files("method")
        print(all_of(files) if given.name is None else one_of(given.name, files))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


def all_of(files: dict[str, Path]) -> str:
    """Return a table of methods, a line each; as wide as the terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDEST
    lines = [["name", "needs", "cost", "use"]]
    for name, file in files.items():
        told = Told.of(file)
        lines.append([name, told.needs, told.cost, told.use])
    hint = "+method=NAME runs one, +method=[A,B] several; fimo methods NAME shows its settings"
    return "\n".join([*table(lines, width), "", hint])


def one_of(name: str, files: dict[str, Path]) -> str:
    """Return what a method says of itself, and its settings with their comments.

    Raises:
        InputError: there is no such method.
    """
    if name not in files:
        raise InputError("method", f"there is no {name!r}; {nearest(name, list(files))}")
    told = Told.of(files[name])
    said = {"needs": told.needs, "cost": told.cost, "use": told.use}
    lines = [told.summary, *(f"{key + ':':<7} {text}" for key, text in said.items() if text)]
    settings = f"Settings (methods.{name}.KEY=VALUE), of {files[name]}:"
    return "\n".join([*lines, "", settings, files[name].read_text().rstrip()])


@dataclass(frozen=True)
class Told:
    """What a method's class says of itself; empty where it says nothing."""

    summary: str = ""
    needs: str = ""
    cost: str = ""
    use: str = ""

    @classmethod
    def of(cls, file: Path) -> Told:
        """Return what is told by the class that a method's file names."""
        node = OmegaConf.load(file)
        target = next(
            (str(v._target_) for v in node.values() if isinstance(v, DictConfig) and "_target_" in v), ""
        )
        found: dict[str, str] = {}
        for definition in with_bases(target):
            for name, text in _texts(definition).items():
                found.setdefault(name, text)
        return cls(**found)


def _texts(definition: Definition) -> dict[str, str]:
    """Return the first line of a class's docstring, and the texts that it is given under the known names."""
    found = {}
    if doc := ast.get_docstring(definition):
        found["summary"] = without_markup(doc.splitlines()[0])
    for line in definition.body:
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
            for name in line.targets:
                if isinstance(name, ast.Name) and name.id in ("needs", "cost", "use"):
                    found[name.id] = str(line.value.value)
    return found
