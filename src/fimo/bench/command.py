"""``fimo bench``: make, verify, score and table from the command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fimo.errors import InputError
from fimo.methods.catalogue import packaged_conf

if TYPE_CHECKING:
    from fimo.bench.gold_standard import GoldStandard

DESCRIPTION = """
Gold standards of training-data attribution in a fixed list of settings, and methods judged by them.

    fimo bench list                                  the settings there are
    fimo bench make diabetes concrete/adam           make the gold standards of some
    fimo bench verify diabetes/sgd                   compute a sample of them again
    fimo bench score --method ekfac --method mine.Method
    fimo bench table --page docs/leader_board.md     the leader board
"""

FOLDER, STORE = "outputs/bench", "outputs/store"


def console(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``fimo bench`` (``python -m fimo.bench``) and end the process."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a user's own methods
    try:
        status = main(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is there", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(status)


def main(arguments: Sequence[str]) -> int:
    """Run a command line; return the exit status.

    Raises:
        InputError: naming the flag, setting or key at fault.
    """
    given = parser().parse_args(list(arguments))
    given.config_dir = None if given.config_dir is None else Path(given.config_dir)
    given.folder = Path(given.folder)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("fimo.bench").setLevel(logging.INFO)
    run = {"list": list_settings, "make": make, "verify": verify, "score": score, "table": table}[
        given.action
    ]
    try:
        return run(given)
    except SystemExit:  # how a Lightning Trainer answers an interruption
        raise KeyboardInterrupt from None


def list_settings(given: argparse.Namespace) -> int:
    """Print the settings, and which of them are made."""
    from fimo.bench.gold_standard import made
    from fimo.bench.settings import chosen

    there = set(made(given.folder))
    for setting in chosen(given.setting, given.config_dir):
        mark = "made" if setting.name in there else ""
        print(f"{setting.name:24} {mark:5} {setting.about}")
    return 0


def make(given: argparse.Namespace) -> int:
    """Make gold standards; those whose data are not here are left out."""
    start(given)
    from fimo.bench.making import Making
    from fimo.bench.making import make as make_all
    from fimo.bench.settings import chosen

    making = Making(given.folder, Path(given.store), given.models, given.scale)
    make_all(chosen(given.setting, given.config_dir), making, given.shard)
    return 0


def verify(given: argparse.Namespace) -> int:
    """Compute a sample of gold standards again; 1 where anything differs by more than rounding."""
    start(given)
    from fimo.bench.settings import chosen
    from fimo.bench.verification import Sample, Verdict, verify, verify_source

    sample = Sample(given.left_out, given.seeds, given.final_models, given.draw)
    different = False
    for gold in present(given):
        findings = list(verify(gold, sample))
        if given.from_source:
            findings += verify_source(gold, chosen([gold.name], given.config_dir)[0])
        for finding in findings:
            print(f"{gold.name}: {finding}", flush=True)
        different |= any(finding.found == Verdict.DIFFERENT for finding in findings)
    return int(different)


def score(given: argparse.Namespace) -> int:
    """Judge methods by the gold standards that are there; those that do not apply are left out."""
    start(given)
    from omegaconf import OmegaConf

    from fimo.bench.protocols import judge_of
    from fimo.bench.scoring import Candidate, applicable_names, told
    from fimo.bench.scoring import score as judged
    from fimo.bench.settings import chosen
    from fimo.curvature.solvers import DivergenceError

    settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given.set))
    candidates = [Candidate.of(name, settings) for name in applicable_names(given.method)]
    done = False
    for gold in present(given):
        judge = None
        if given.protocol is not None:
            setting = chosen([gold.name], given.config_dir)[0]
            judge = judge_of(given.protocol, gold, setting, Path(given.store))
        for candidate in candidates:
            try:
                print(told(judged(gold, candidate, given.folder, judge)), flush=True)
                done = True
            except (InputError, DivergenceError) as error:
                print(f"{gold.name}, {candidate.name}: left out: {error}", file=sys.stderr, flush=True)
    return int(not done)


def table(given: argparse.Namespace) -> int:
    """Print the leader board, and write its page where one is asked for."""
    from fimo.bench.leader_board import Board, text

    names = there(given)
    board = Board.of(given.folder, given.metric, names)
    print(text(board))
    if given.logger:
        from fimo.bench.logged import rows_of, tell
        from fimo.bench.settings import chosen

        for name, rows in rows_of(given.folder, names).items():
            setting = chosen([name], given.config_dir)[0]
            print(tell(board.golds[name], rows, given.folder, setting, given.logger))
    if given.page:
        from fimo.bench.page import write_page

        for path in write_page(board, Path(given.page)):
            print(path)
    return 0


def present(given: argparse.Namespace) -> Iterator[GoldStandard]:
    """Yield the gold standards that were asked for and are there; see :func:`there`."""
    from fimo.bench.gold_standard import load

    for name in there(given):
        yield load(name, given.folder)


def there(given: argparse.Namespace) -> list[str]:
    """Return the settings that were asked for and whose gold standards are there; all when none was named.

    Raises:
        InputError: there are none, or one that was named is not there.
    """
    from fimo.bench.gold_standard import made
    from fimo.bench.settings import matching

    names = made(given.folder)
    if not names:
        raise InputError("--folder", f"{given.folder} holds no gold standards; fimo bench make makes them")
    return matching(given.setting, names)


def start(given: argparse.Namespace) -> None:
    """Prepare the process for computations."""
    import torch

    from fimo.app.environment import quiet_libraries

    quiet_libraries()
    if given.threads:
        torch.set_num_threads(given.threads)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        "fimo bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = found.add_subparsers(dest="action", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("setting", nargs="*", help="concrete/sgd; concrete; */adam; all when left out")
    common.add_argument("--folder", default=FOLDER, help=f"of the gold standards ({FOLDER})")
    common.add_argument("--config-dir", help=f"folder of your own settings, as {packaged_conf().name} is")
    common.add_argument("--threads", type=int, help="of torch; all cores when left out")
    actions.add_parser("list", parents=[common], help="the settings there are")
    making = actions.add_parser("make", parents=[common], help="make gold standards that are not there yet")
    making.add_argument("--models", type=int, default=5, help="final models of each setting (5)")
    making.add_argument("--scale", type=float, default=1.0, help="share of seeds, instances and epochs (1)")
    making.add_argument("--shard", help="k/n, from 0/n: the k-th of n parts of the final models")
    making.add_argument("--store", default=STORE, help="from which a killed run goes on")
    verifying = actions.add_parser("verify", parents=[common], help="compute a sample of them again")
    verifying.add_argument("--left-out", type=int, default=3, help="instances that are left out again (3)")
    verifying.add_argument("--seeds", type=int, default=2, help="with so many seeds (2)")
    verifying.add_argument("--final-models", type=int, default=1, help="from so many final models (1)")
    verifying.add_argument("--draw", type=int, default=0, help="seed of the sample's draw (0)")
    verifying.add_argument(
        "--from-source", action="store_true", help="read the data and train a final model again too"
    )
    scoring = actions.add_parser("score", parents=[common], help="judge methods by the gold standards")
    scoring.add_argument(
        "--method", action="append", required=True, help="a name, all, or a class: mine.Method; repeatable"
    )
    scoring.add_argument(
        "--set", action="append", default=[], help="an argument of it: damping=10x; repeatable"
    )
    scoring.add_argument(
        "--protocol",
        help="lds, retraining, mislabelled, or a control (class_detection …) instead of agreement with the "
        "gold standard",
    )
    scoring.add_argument("--store", default=STORE, help=f"of what these train ({STORE})")
    tabling = actions.add_parser("table", parents=[common], help="the leader board")
    tabling.add_argument("--metric", default="cosine", help="cosine (the default), spearman or pearson")
    tabling.add_argument("--logger", help="log each setting's as a run: wandb, tensorboard, csv")
    tabling.add_argument("--page", help="write it with figures to this file of Markdown")
    return found
