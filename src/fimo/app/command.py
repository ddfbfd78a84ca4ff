"""The command line: Hydra composes the configuration, mistakes become one line, the experiment runs."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fimo import __version__
from fimo.app import methods, show
from fimo.app.config import plain, validated
from fimo.app.jobs import run_once
from fimo.app.mistakes import in_one_line, readable
from fimo.app.run_folder import RunFolder, given_folder
from fimo.app.search_path import SearchPath, flags_first, use_installed_packages
from fimo.app.sweep import Sweep, is_sweep, only_shows, resolved
from fimo.errors import CheckFailedError, InputError, nearest, shortened
from fimo.methods.catalogue import packaged_conf
from fimo.store import inventory

# the launchers' settings have the plugins' own names, so that Hydra checks them against the plugins' schemas
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Hydra's switch: exceptions reach the caller."""


def main(conf: Path) -> None:
    """Run the command line given in ``sys.argv``, with configuration groups from the folder ``conf``."""
    if "--version" in sys.argv[1:]:
        print(f"fimo {__version__}")
        return
    if sys.argv[1:2] == ["store"]:
        inventory.console(sys.argv[2:])
    if sys.argv[1:2] == ["bench"]:
        from fimo.bench.command import console as bench  # which stands above the command line

        with _open_output():
            bench(sys.argv[2:])
    if sys.argv[1:2] == ["show"]:
        with _open_output():
            show.console(sys.argv[2:])
    if sys.argv[1:2] == ["methods"]:
        with _open_output():
            methods.console(sys.argv[2:])
    conf = conf.resolve()  # Hydra would take a relative folder as relative to this file
    sys.argv[1:] = flags_first(list(map(readable, sys.argv[1:])))
    places = SearchPath((conf,))
    try:
        check_flags(sys.argv[1:])
        places = SearchPath.of(sys.argv[1:], conf)
        with _own_errors(), _open_output():
            _start(conf, places)
    except (HydraException, OmegaConfBaseException) as error:  # some are OSErrors too
        _fail(in_one_line(error, places))
    except (InputError, OSError) as error:
        _fail(error)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is in the store", file=sys.stderr)
        raise SystemExit(130) from None


def _start(conf: Path, places: SearchPath) -> None:
    use_installed_packages()
    # Hydra 1.4 does without the version whose defaults hold, and warns of it
    base = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
    as_command = hydra.main(config_path=str(conf), config_name="config", **base)
    check_choices(sys.argv[1:], places)
    check_plugins(sys.argv[1:], places)
    if not is_sweep(sys.argv[1:]):
        given = None if only_shows(sys.argv[1:]) else given_folder(sys.argv[1:])
        # held before Hydra writes its files into it
        held = None if given is None else RunFolder(Path(resolved(given)))
        as_command(functools.partial(job, held=held))()
        return
    start = as_command(job)
    sweep = Sweep(sys.argv[1:], places)
    sys.argv += sweep.arguments
    try:
        start()
    finally:
        all_done = sweep.conclude()
    _report(sweep.folder)
    if not all_done:
        raise SystemExit(1)


def _report(folder: Path) -> None:
    """Put a sweep's jobs side by side, where they wrote reports; no sweep is lost where that fails."""
    if not any(folder.glob("*/report.html")):
        return
    from fimo.reporting.overlay import sweep_report  # torch takes seconds to import

    try:
        if (report := sweep_report(folder)) is not None:
            print(f"the jobs side by side: {report}")
    except Exception as error:
        print(f"the jobs side by side could not be drawn: {error}", file=sys.stderr)


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Let exceptions through, which Hydra would print itself, over several lines, before it exits."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before


@contextlib.contextmanager
def _open_output() -> Iterator[None]:
    """End without a word where whoever read the output has closed it (``--help | head``)."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # not at the end of the process, where nobody could catch it
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def console() -> None:
    """Run the command line with the packaged configuration: ``fimo``, or ``python -m fimo``."""
    sys.path.insert(0, str(Path.cwd()))  # a user's own modules, as with `python -m`
    main(packaged_conf())


def job(composed: DictConfig, held: RunFolder | None = None) -> float | None:
    """Run one job of a sweep, or the only one.

    Args:
        held: the only one's folder, where it is held already.

    Returns:
        The objective for a sweeper that searches (:func:`fimo.app.experiment.best_agreement`); NaN where the
        job failed and the sweep goes on.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.RUN:
        try:
            held = held or RunFolder(folder)
            try:
                return _run(composed, folder, held)
            finally:
                held.end()
        except (InputError, OSError) as error:  # here, since Hydra would print the overrides above it
            _fail(error)
        except CheckFailedError:  # its table is printed
            raise SystemExit(1) from None
    # the basic sweeper would stop at the batch that a failed job is in; others count failures themselves
    go_on = hydra_config.sweeper._target_.endswith("BasicSweeper")
    return run_once(
        lambda: _run(composed, folder),
        composed,
        folder,
        hydra_config.job.num,
        list(hydra_config.overrides.task),
        go_on,
    )


def _run(composed: DictConfig, folder: Path, held: RunFolder | None = None) -> float | None:
    config = validated(composed, SearchPath.of_job())
    if held is not None:
        held.begin(plain(config))
    from fimo.app.experiment import run_experiment  # torch and Lightning take seconds to import

    try:
        return run_experiment(config, folder)
    except SystemExit:  # how a Lightning Trainer answers an interruption
        raise KeyboardInterrupt from None


def check_flags(arguments: list[str]) -> None:
    """Refuse flags that Hydra does not know: settings have no dashes.

    Raises:
        InputError: naming the first.
    """
    _, unknown = get_args_parser().parse_known_args(arguments)
    for flag in unknown:
        raise InputError(flag, f"unknown flag; settings are given as {flag.lstrip('-').split('=')[0]}=VALUE")


def check_choices(arguments: list[str], places: SearchPath) -> None:
    """Refuse a group's unknown choice with the nearest names, in one line.

    Raises:
        InputError: naming the group.
    """
    for argument in arguments:
        match = re.fullmatch(r"\+*([a-z_]+)=([^$()]*)", argument)  # nothing that Hydra would work out
        if match and match[1] == "methods" and match[2][:1] != "{":
            raise InputError("methods", f"did you mean +method={match[2]}?")
        if not match or not places.has(match[1]):
            continue
        group = match[1]
        allowed = list(places.files(group))
        there = f"there are {shortened(allowed, 30)}"
        choices = [choice.strip("'\"") for choice in re.split(r"[,\[\] ]+", match[2]) if choice]
        if not choices:
            raise InputError(group, f"expected a choice but got nothing; {there}")
        for choice in choices:
            if choice == "null":
                without = (
                    "without it all methods run" if group == "method" else f"~{group} leaves the group out"
                )
                raise InputError(group, f"null is no choice; {without}")
            if choice not in allowed:
                hint = there if choice in ("?", "help", "list", "all") else nearest(choice, allowed)
                raise InputError(group, f"no choice {choice!r}; {hint}")


def check_plugins(arguments: list[str], places: SearchPath) -> None:
    """Refuse a launcher or sweeper whose package is not installed, saying how to install it.

    Raises:
        InputError: naming the group.
    """
    for argument in arguments:
        group, _, choice = argument.partition("=")
        file = places.files(group).get(choice) if group in ("hydra/launcher", "hydra/sweeper") else None
        if file is None:
            continue
        node = OmegaConf.load(file)
        package = ".".join(str(node._target_).split(".")[:2])
        if package.startswith("hydra_plugins") and importlib.util.find_spec(package) is None:
            extra = {"ray": "ray", "search": "optuna"}.get(choice, "sweeps")
            raise InputError(group, f"{choice} needs {package.split('.')[1]}: pip install 'fimo[{extra}]'")


def _fail(error: InputError | OSError) -> NoReturn:
    if isinstance(error, OSError):
        if error.filename is None or error.errno is None:  # not about a file, so not the user's
            raise error
        error = InputError(str(error.filename), os.strerror(error.errno))
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
