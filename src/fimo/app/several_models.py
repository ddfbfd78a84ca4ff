"""``model.seeds``: a study of several final models, each in a folder of its own, as one result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fimo.app.config import plain
from fimo.app.environment import versions
from fimo.app.journal import Journal
from fimo.app.loggers import in_a_line
from fimo.cost import Cost, cost_table
from fimo.errors import InputError
from fimo.evaluation import Evaluation
from fimo.evaluation.several_models import SeveralModels, over_models
from fimo.live.part_log import PartLog
from fimo.reporting.flat import flat
from fimo.reporting.models_answer import models_answer
from fimo.reporting.models_run import FOLDER, ModelsRun, only_means
from fimo.reporting.results import Results
from fimo.reporting.wandb import tell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Studied:
    """What a study of one final model found."""

    results: Results
    evaluation: Evaluation


def study_models(
    config: DictConfig, journal: Journal, study: Callable[[DictConfig, Journal], Studied | None]
) -> SeveralModels | None:
    """Study several final models, and put together how methods are judged by them.

    Each final model's study writes what a run of it alone would write, into a folder of ``final_models``;
    what is expensive about it is in the store, so that a killed run goes on.

    Args:
        study: of one final model; None where it ends before methods are judged.

    Returns:
        None where each ends before that.

    Raises:
        InputError: of a final model, which its message names.
    """
    results: dict[int, Results] = {}
    evaluations: list[Evaluation] = []
    models = final_models(config)
    for number, (name, one) in enumerate(models.items()):
        said = f"final model {number + 1} of {len(models)}, {one.model.checkpoint or f'seed={name}'}"
        log.info("%s", said)
        with _part(config, journal, f"{FOLDER}/{name}", one, said) as part:
            found = study(one, part)
        journal.costs.extend(part.costs)
        journal.skipped.update(part.skipped)
        if found is not None:
            results[name] = only_means(found.results)
            evaluations.append(found.evaluation)
        del found  # with it go the single seeds' changes
    journal.costs[:] = added(journal.costs)
    if not evaluations:
        return None
    with journal.stage("evaluation"):
        several = over_models(evaluations)
        several.save(journal.folder)
    with journal.stage("report"):
        report(several, results, config, journal)
    journal.costs[:] = added(journal.costs)
    for note in several.notes:
        log.warning("%s", note)
    return several


def final_models(config: DictConfig) -> dict[int, DictConfig]:
    """Return the configuration of each final model alone, by its seed; of those given, by their position."""
    changes: dict[int, dict[str, Any]] = {}
    if OmegaConf.is_list(config.model.checkpoint):
        for position, file in enumerate(config.model.checkpoint):
            changes[position] = {"model": {"seeds": 1, "checkpoint": file}}
    else:
        for seed in range(config.seed, config.seed + config.model.seeds):
            changes[seed] = {"seed": seed, "model": {"seeds": 1}}
    merged = {name: OmegaConf.merge(config, change) for name, change in changes.items()}
    return {name: one for name, one in merged.items() if isinstance(one, DictConfig)}


@contextmanager
def _part(config: DictConfig, journal: Journal, name: str, one: DictConfig, said: str) -> Iterator[Journal]:
    """Yield the journal of a final model's study, in a folder of this name; errors say which it is."""
    folder = journal.folder / name
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(one))
    whole = flat(plain(config))
    settings = {key: whole[key] for key in whole if key == "seed" or key.startswith("model.")}
    own = PartLog(journal.log, folder, name, settings)
    part = Journal(folder, log=own)
    try:
        yield part
    except InputError as error:
        own.end("failed", in_a_line(error))
        raise InputError(error.key, f"{error.problem} ({said})") from error
    except (KeyboardInterrupt, SystemExit):
        own.end("interrupted", "interrupted")
        raise
    except BaseException as error:
        own.end("failed", in_a_line(error))
        raise
    part.end()
    own.end("finished")


def report(
    several: SeveralModels, results: Mapping[int, Results], config: DictConfig, journal: Journal
) -> None:
    """Write what is shown of all final models, and log it."""
    run = ModelsRun.of(results, several, cost_table(added(journal.costs)), plain(config), versions())
    run.save(journal.folder)
    models_answer(run).save(journal.folder)
    if config.report:
        from fimo.reporting import write_models_report  # with packages that nothing else needs

        write_models_report(run, journal.folder / "report.html")
    tell(journal.log, run.combined, journal.folder / "report.html")


def added(costs: Sequence[Cost]) -> list[Cost]:
    """Return one cost for each stage: sums over final models, the largest memory, the mean share reused."""
    by_stage: dict[str, list[Cost]] = {}
    for cost in costs:
        by_stage.setdefault(cost.stage, []).append(cost)
    return [
        Cost(
            stage,
            sum(c.seconds for c in each),
            max(c.peak_memory_mb for c in each),
            sum(c.gradient_evaluations for c in each),
            sum(c.reused for c in each) / len(each),
        )
        for stage, each in by_stage.items()
    ]
