"""Where groups of configuration are looked for: the package's folder, installed packages', and the user's.

Hydra looks itself; this is for what is said before it does (the nearest choice, all methods).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from fimo.errors import InputError
from fimo.methods.catalogue import plugin_folders

HYDRAS_OWN = ("hydra", "schema")
"""Providers of Hydra's groups and of structured configurations."""


class InstalledPackages(SearchPathPlugin):
    """Adds the folders of installed packages, after the packaged one: they add choices and change none."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for name, folder in plugin_folders().items():
            search_path.append(provider=name, path=f"file://{folder}")


@dataclass(frozen=True)
class SearchPath:
    """Folders that hold a folder for each group, in the order in which a choice is looked for.

    Args:
        folders: of the command line (``--config-dir``), the packaged one, of installed packages, and of
            ``hydra.searchpath``.
    """

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, arguments: Sequence[str], conf: Path) -> SearchPath:
        """Return where a command line makes Hydra look.

        Args:
            arguments: without the program.
            conf: the packaged folder.

        Raises:
            InputError: ``--config-dir`` is no folder.
        """
        given, _ = get_args_parser().parse_known_args(list(arguments))
        own = [] if given.config_dir is None else [Path(given.config_dir).absolute()]
        if own and not own[0].is_dir():
            raise InputError("--config-dir", f"no such folder: {given.config_dir}")
        found = cls((*own, conf, *plugin_folders().values()))
        more = [path for path in map(_folder, found._asked_for(arguments, given.config_name)) if path]
        return cls((*found.folders, *more))

    @classmethod
    def of_job(cls) -> SearchPath:
        """Return where Hydra looked for the job that it runs (known in a launcher's process too)."""
        sources = HydraConfig.get().runtime.config_sources
        places = [f"{s.schema}://{s.path}" for s in sources if s.provider not in HYDRAS_OWN]
        return cls(tuple(path for path in map(_folder, places) if path))

    def has(self, group: str) -> bool:
        """Return whether any folder has a group."""
        return any((folder / group).is_dir() for folder in self.folders)

    def files(self, group: str) -> dict[str, Path]:
        """Return the files of a group's choices by name; of equal names, the one that Hydra takes."""
        found: dict[str, Path] = {}
        for folder in reversed(self.folders):
            files = (folder / group).rglob("*.yaml")
            found |= {f.relative_to(folder / group).with_suffix("").as_posix(): f for f in files}
        return dict(sorted(found.items()))

    def _asked_for(self, arguments: Sequence[str], config_name: str | None) -> list[str]:
        """Return ``hydra.searchpath``: of the command line, else of the primary configuration."""
        for argument in arguments:
            key, _, value = argument.lstrip("+").partition("=")
            if key == "hydra.searchpath":
                return [part.strip("'\" ") for part in value.strip("'\"[] ").split(",")]
        name = f"{(config_name or 'config').removesuffix('.yaml')}.yaml"
        for folder in self.folders:
            if (folder / name).is_file():
                node = OmegaConf.load(folder / name)
                asked = OmegaConf.select(node, "hydra.searchpath") if isinstance(node, DictConfig) else None
                return list(map(str, asked or []))
        return []


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Return a command line with Hydra's flags before all settings: it refuses settings on both sides."""
    parser = get_args_parser()
    takes: dict[str, Any] = {name: a for a in parser._actions for name in a.option_strings}
    flags, settings, left = [], [], list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            settings.append(argument)
            continue
        action = takes.get(argument)
        if action is not None and action.nargs == "?":  # --info, whose value may be missing
            value = (
                left.pop(0) if left and "=" not in left[0] and not left[0].startswith("-") else action.const
            )
            flags.append(f"{action.option_strings[0]}={value}")
            continue
        flags.append(argument)
        if action is not None and action.nargs is None and left:
            flags.append(left.pop(0))
    return [*flags, *settings]


def use_installed_packages() -> None:
    """Make Hydra look into the folders of installed packages too."""
    Plugins.instance().register(InstalledPackages)


def _folder(place: str) -> Path | None:
    """Return the folder of one of Hydra's places, ``file://FOLDER`` or ``pkg://MODULE``; None of others."""
    schema, separator, path = place.partition("://")
    if not separator:
        return Path(place).absolute()
    if schema == "file":
        return Path(path).absolute()
    if schema == "pkg":
        spec = importlib.util.find_spec(path.split(".")[0].split("/")[0])
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)), *path.replace("/", ".").split(".")[1:])
    return None
