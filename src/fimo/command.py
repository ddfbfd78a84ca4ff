"""The command line: Hydra composes the configuration, mistakes become one line, the experiment runs."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fimo.config import nearest, validated
from fimo.errors import InputError

log = logging.getLogger(__name__)

MULTIRUN = ("-m", "--multirun")
"""Goes first: Hydra refuses settings on both sides of it."""


def main(conf: Path) -> None:
    """Run the command line given in ``sys.argv``, with configuration groups from the folder ``conf``."""
    conf = conf.resolve()  # Hydra would take a relative folder as relative to this file
    sys.argv[1:] = sorted(map(_as_addition, sys.argv[1:]), key=lambda argument: argument not in MULTIRUN)
    try:
        check_choices(sys.argv[1:], conf)
    except InputError as error:
        _fail(error)
    hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(job)()


def job(composed: DictConfig) -> float | None:
    """Run one job of a sweep, or the only one.

    Returns:
        The objective for a sweeper that searches (see ``evaluation.objective``), or None.
    """
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        config = validated(composed, conf_folder())
        from fimo.experiment import run_experiment  # torch and Lightning take seconds to import

        return run_experiment(config, Path(HydraConfig.get().runtime.output_dir))
    except InputError as error:
        if single:
            _fail(error)
        log.error("%s", error)
        raise  # so that the launcher counts this job as failed and goes on with the next


def conf_folder() -> Path:
    """Return the folder of groups that Hydra composed from (known in a launcher's process too)."""
    sources = HydraConfig.get().runtime.config_sources
    return Path(next(source.path for source in sources if source.provider == "main"))


def check_choices(arguments: list[str], conf: Path) -> None:
    """Refuse a group's unknown choice with the nearest names, in one line.

    Raises:
        InputError: naming the group.
    """
    for argument in arguments:
        match = re.fullmatch(r"\+?([a-z_]+)=([\w\-/,\[\] ]+)", argument)
        if not match or not (conf / match[1]).is_dir():
            continue
        folder = conf / match[1]
        allowed = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
        for choice in re.split(r"[,\[\] ]+", match[2]):
            if choice and choice != "null" and choice not in allowed:
                raise InputError(match[1], f"no choice {choice!r}; {nearest(choice, allowed)}")


def _as_addition(argument: str) -> str:
    """Accept ``method=X`` as well as ``+method=X``: the group is not in the defaults list."""
    return f"+{argument}" if argument.startswith("method=") else argument


def _fail(error: InputError) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
