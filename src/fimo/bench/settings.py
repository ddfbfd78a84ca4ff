"""The benchmark's settings: presets ``experiment=bench/NAME``, each with SGD and with Adam."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from fimo.app.config import plain, validated
from fimo.app.search_path import SearchPath, use_installed_packages
from fimo.errors import InputError, nearest
from fimo.methods.catalogue import packaged_conf

GROUP = "bench"
"""Presets are the files ``experiment/bench/NAME.yaml`` of any folder of configuration."""

OPTIMIZERS = {"sgd": "default", "adam": "adam"}
"""The second part of a setting's name, and its choice of ``further_training``."""


@dataclass(frozen=True)
class Setting:
    """A data set, a model and a protocol of further training.

    Args:
        name: ``concrete/sgd``.
        about: in one line.
        config_dir: of the user's own, in which a preset is looked for first.
    """

    name: str
    about: str
    config_dir: Path | None = None

    @property
    def preset(self) -> str:
        """What it is, but for the optimizer."""
        return self.name.rpartition("/")[0]

    @property
    def overrides(self) -> list[str]:
        """What the command line would be given to make a run of it."""
        optimizer = self.name.rpartition("/")[2]
        return [f"experiment={GROUP}/{self.preset}", f"further_training={OPTIMIZERS[optimizer]}"]

    def config(self, seed: int, store: str | Path, scale: float = 1.0, logger: str = "none") -> DictConfig:
        """Return the checked configuration of one final model.

        Args:
            seed: of the final model.
            store: the cache of results.
            scale: of seeds, left-out and test instances and epochs.
            logger: a choice of loggers.

        Raises:
            InputError: naming the key at fault, such as ``dataset.path``.
        """
        own = [] if self.config_dir is None else [f"hydra.searchpath=[file://{self.config_dir.absolute()}]"]
        overrides = [
            *self.overrides, f"seed={seed}", f"scale={scale}", "+method=random", f"logger={logger}",
            "report=false", "trainer.enable_progress_bar=false", *own,
        ]  # fmt: skip
        use_installed_packages()
        base = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
        conf = packaged_conf()
        with initialize_config_dir(str(conf), **base):
            composed = compose("config", overrides=overrides)
        composed.store = str(store)  # as an override, any path would have to be quoted
        return validated(composed, places(self.config_dir))


def places(config_dir: Path | None = None) -> SearchPath:
    """Return where presets are looked for.

    Raises:
        InputError: ``--config-dir`` is no folder.
    """
    own = [] if config_dir is None else ["--config-dir", str(config_dir)]
    return SearchPath.of(own, packaged_conf())


def settings(config_dir: Path | None = None) -> list[Setting]:
    """Return all settings there are, by name."""
    files = places(config_dir).files(f"experiment/{GROUP}")
    return [
        Setting(f"{name}/{optimizer}", about(file), config_dir)
        for name, file in files.items()
        for optimizer in OPTIMIZERS
    ]


def chosen(names: Sequence[str], config_dir: Path | None = None) -> list[Setting]:
    """Return settings by name, see :func:`matching`.

    Raises:
        InputError: no setting has such a name.
    """
    there = {setting.name: setting for setting in settings(config_dir)}
    return [there[name] for name in matching(names, list(there))]


def matching(names: Sequence[str], there: Sequence[str]) -> list[str]:
    """Return which of the names of settings that there are were asked for.

    Args:
        names: of settings; a preset's stands for both optimizers, ``*`` for anything; all when empty.

    Raises:
        InputError: nothing has such a name.
    """
    found: dict[str, None] = {}
    for name in names or ["*"]:
        some = [one for one in there if fnmatch.fnmatch(one, name) or one.rpartition("/")[0] == name]
        if not some:
            raise InputError("setting", f"there is no {name!r}; {nearest(name, there)}")
        found |= dict.fromkeys(some)
    return list(found)


def about(file: Path) -> str:
    """Return the first comment of a preset's file that is for people."""
    lines = [line.lstrip("# ").strip() for line in file.read_text().splitlines() if line.startswith("#")]
    words = next((line for line in lines if not line.startswith("@package")), "")
    return words.removeprefix("Benchmark: ").removeprefix("Benchmark, ")


PLACES = {
    "dataset": ("path", "test_path"),
    "trainer": ("accelerator", "devices", "strategy", "enable_progress_bar"),
}
"""Keys that say where something is, and not what."""


def identity(config: DictConfig) -> dict[str, Any]:
    """Return what of a configuration a gold standard depends on, wherever it is made, as plain containers."""
    everything = plain(config)
    found = {k: everything[k] for k in ("dataset", "model", "trainer", "further_training", "seed", "scale")}
    for group, keys in PLACES.items():
        found[group] = {k: value for k, value in found[group].items() if k not in keys}
    return found
