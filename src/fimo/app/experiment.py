"""The story of a run: data, final model, gold standard, methods, their agreement, the report."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from fimo.app.amounts import settle_amounts
from fimo.app.audit_report import write_audit
from fimo.app.audited import audited, settings_of
from fimo.app.build import (
    build_data,
    build_final_model,
    build_methods,
    build_module,
    build_tasks,
    check_evaluation,
)
from fimo.app.check_run import check_run
from fimo.app.config import plain
from fimo.app.effects import with_rows, write_effects
from fimo.app.environment import quiet_libraries
from fimo.app.final_models import FinalModels
from fimo.app.journal import Journal
from fimo.app.loggers import about, logged
from fimo.app.plan import Plan
from fimo.app.run import Run
from fimo.app.scoring import applicable
from fimo.app.several_models import Studied, final_models, study_models
from fimo.app.show import shown
from fimo.app.summary import summarise, with_findings
from fimo.app.time_left import TimeLeft
from fimo.app.trainers import build_trainer, further_training_settings, training_code, training_settings
from fimo.app.validation_part import with_validation_part
from fimo.cost import Cost, write_costs
from fimo.data.datamodule import InstancesModule
from fimo.engine.context import check_micro_batches
from fimo.errors import InputError
from fimo.evaluation import Evaluation, assess
from fimo.further_training.sensitivity import Sensitivity, check_finite
from fimo.live.agreement import logs_agreement
from fimo.live.callbacks import LogsFurtherTraining, LogsTraining
from fimo.live.trainers_logger import TrainersLogger
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel
from fimo.models.lightning_module import FinalModelModule
from fimo.models.measured import Measured
from fimo.models.training import Quality, quality, save_checkpoint, train_final_model
from fimo.reporting.results import Results
from fimo.reporting.study_answer import study_answer
from fimo.reporting.wandb import tell
from fimo.scores import Scores
from fimo.store.files import Store
from fimo.tasks.base import Task
from fimo.validation.poor import Comparison, compared, untold

log = logging.getLogger(__name__)


def run_experiment(config: DictConfig, run_dir: Path) -> float:
    """Run what a checked configuration describes, and write the run's folder.

    Returns:
        The best method's agreement with the sensitivity at the last evaluation point (of the first
        metric), for sweepers that search; NaN where the run ends before.

    Raises:
        InputError: bad input, before any training.
        CheckFailedError: the check that the run ends with (``until=check``) did not pass.
    """
    quiet_libraries()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with logged(config, run_dir) as live:
        return run_stages(config, Journal(run_dir, log=live))


def run_stages(config: DictConfig, journal: Journal) -> float:
    """Run all stages, of one final model or of each; see :func:`run_experiment`."""
    if len(final_models(config)) > 1:
        several = study_models(config, journal, partial(one_model, one_of_several=True))
        table = None if several is None else several.table
    else:
        found = one_model(config, journal)
        table = None if found is None else found.evaluation.table
    worth = journal.end()
    if config.until == "report":
        tell_in_short(config, journal.folder)
    return worth if table is None else best_agreement(table, config.evaluation.metrics[0])


def one_model(config: DictConfig, journal: Journal, one_of_several: bool = False) -> Studied | None:
    """Run all stages of one final model.

    Args:
        one_of_several: also measure what the components of variance over final models need.

    Returns:
        None where they end before methods are judged: a check, an audit, further training alone.
    """
    run_dir = journal.folder
    prepared = prepare(config, journal)
    if config.until != "check":
        journal.log.begin(about(prepared.run, config, run_dir))
    journal.ahead = time_left(prepared, config)
    run, final_quality = with_final_model(prepared, config, journal)
    trained = run.of_trained_part()
    if config.until == "check":
        check_run(trained.final_model, trained.data, run.plan, run.methods, run.device, run_dir)
        return None

    if not config.model.accept_poor:
        refuse_poor(run.final_model, run.data)
        known = dataclasses.replace(trained.final_model, accept_poor=True)  # not judged with every part again
        trained = dataclasses.replace(trained, final_model=known)
    trained = trained.with_description()
    if config.mode == "audit":
        write_audit(audited(trained, run.data, config, journal), run, final_quality, config, journal)
        return None
    sensitivity = gold_standard(trained, config.further_training.save_raw, journal)
    if config.until == "further_training":
        return None

    told = logs_agreement(journal.log, sensitivity, list(config.evaluation.metrics))
    scores = scored(trained, journal, told)
    run = run.of_methods(scores)
    findings = judged(run, prepared.tasks, journal)
    evaluation = evaluated(scores, sensitivity, config, journal, one_of_several)
    write_effects(journal.folder / "effects.csv", sensitivity, scores, run.data)
    with journal.counted("report"):
        results = summarise(
            plain(config), run.data, run.final_model, final_quality, sensitivity, run.methods, scores,
            evaluation, journal.costs, journal.skipped,
        )  # fmt: skip
        results = with_findings(results, findings, run_dir, prepared.tasks)
        report(results, config, journal)
    for note in evaluation.notes:
        log.warning("%s", note)
    return Studied(results, evaluation)


@dataclass(frozen=True)
class Prepared:
    """A run before any training, every part of which was checked.

    Args:
        run: with an untrained final model.
        module: that the Trainer trains.
        tasks: more ways to judge, by name.
    """

    run: Run
    module: FinalModelModule
    trainer: pl.Trainer
    tasks: Mapping[str, Task]


def prepare(config: DictConfig, journal: Journal) -> Prepared:
    """Build all that a configuration names; every mistake in it is an error here.

    Raises:
        InputError: naming the key at fault.
    """
    data = build_data(config)
    settle_amounts(config, data)
    plan = Plan.of(config, data)
    check_evaluation(config, len(plan.seeds))
    with_validation_part(data, plan.test, config)
    module = build_module(config, data)
    untrained = build_final_model(module, config)
    check_micro_batches(plan.protocol, untrained, data.train)
    methods: Mapping[str, AttributionMethod] = {}
    skipped: Mapping[str, str] = {}
    if config.mode == "audit":
        settings_of(config, data)
        Measured.of(untrained)
    else:
        methods, skipped = applicable(build_methods(config), untrained, data.train, plan.protocol)
    for name, why in skipped.items():
        log.warning("%s is skipped: %s", name, why)
    if not (measured := Measured.supposed(untrained)).known:
        log.warning("%s", measured.unknown)
    journal.skipped.update(skipped)
    logger = TrainersLogger(journal.log)
    unseen = data.test if data.validation is None else data.validation
    trainer = build_trainer(config, [LogsTraining(journal.log, unseen)], logger, journal.folder)
    further = LogsFurtherTraining(
        journal.log, config.evaluation.metrics[0], config.further_training.subtract_mean
    )
    settings = further_training_settings(config, journal.folder)
    run = Run(
        data, untrained, plan, methods, plain(config.methods), Store(config.store),
        trainer.strategy.root_device, config.seed,
        {**settings, "callbacks": [*settings["callbacks"], further], "logger": logger}, FinalModels(config),
    )  # fmt: skip
    return Prepared(run, module, trainer, build_tasks(config, run))


def time_left(prepared: Prepared, config: DictConfig) -> TimeLeft:
    """Return what foretells the time of a run's stages, whose work is counted in products with parameters."""
    run, plan, rows = prepared.run, prepared.run.plan, len(prepared.run.data.train)
    size = run.final_model.size
    one = plan.protocol.total_steps(rows) * min(plan.protocol.batch_size, rows) * size
    works: dict[str, float] = {}
    if run.trained_here:
        works["final_model"] = (config.trainer.max_epochs or 1) * rows * size
    if config.mode == "audit":
        return TimeLeft(run.store.root, {**works, "audit": config.audit.seeds * one}, run.device.type)
    works["further_training"] = runs = len(plan.seeds) * (len(plan.left_out) + 1) * one
    if config.until != "further_training":
        for name, method in run.methods.items():
            works[name] = len(plan.followed) * one if method.follows_further_training else rows * size
        works |= dict.fromkeys(prepared.tasks, runs)
        works |= {"evaluation": len(plan.seeds) * len(plan.left_out) * len(plan.test), "report": 1}
    return TimeLeft(run.store.root, works, run.device.type)


def with_final_model(prepared: Prepared, config: DictConfig, journal: Journal) -> tuple[Run, Quality]:
    """Train the final model where it is trained here, and write it.

    Raises:
        InputError: its loss is not finite.
    """
    run, module, trainer = prepared.run, prepared.module, prepared.trainer
    with journal.stage("final_model") as cost:
        if run.trained_here:
            settings = training_settings(config)
            code = training_code(config)
            train_final_model(module, run.data, trainer, run.store, settings, run.seed, cost, code)
        final_model = build_final_model(module, config)
        # by another Trainer, so that its content is the same whether it was trained here or read
        save_checkpoint(module, build_trainer(config), journal.folder / "final_model.ckpt")
        found = quality(final_model, run.data)
    if not math.isfinite(found.train_loss):
        raise InputError("model", f"the final model's loss is {found.train_loss}; lower model.lr?")
    log.info("final model: %s", found)
    return dataclasses.replace(run, final_model=final_model), found


def gold_standard(run: Run, save_raw: bool, journal: Journal) -> Sensitivity:
    """Further train without each of the left-out instances, and write the sensitivity."""
    with journal.stage("further_training") as cost:
        sensitivity = with_rows(run.gold_standard(cost), run.data)
        sensitivity.save(journal.folder / "sensitivity.safetensors", with_raw=save_raw)
    check_finite(sensitivity.sensitivity)
    return sensitivity


def scored(
    run: Run, journal: Journal, told: Callable[[str, Scores], None] | None = None
) -> dict[str, Scores]:
    """Return every method's scores, and write them; those of methods that fail are missing.

    Args:
        told: called with each method's, once it has them.

    Raises:
        InputError: all failed.
    """
    scoring, found = run.scoring(), {}

    def score(name: str, cost: Cost) -> Scores:
        scores = scoring.scores(name, run.methods[name], run.settings[name], cost)
        scores.save(journal.folder / "scores" / f"{name}.safetensors")
        return scores

    count = len(run.methods)
    with scoring.sharing(run.methods):
        for k, name in enumerate(run.methods, 1):
            scores = journal.tried(name, partial(score, name), (k, count), only=count == 1)
            if scores is not None:
                found[name] = scores
                if told is not None:
                    told(name, scores)
    if not found:
        raise InputError("method", "; ".join(f"{name} {why}" for name, why in journal.skipped.items()))
    return found


def judged(run: Run, tasks: Mapping[str, Task], journal: Journal) -> dict[str, pd.DataFrame | Sensitivity]:
    """Return what every task finds; what was measured and scored before is judged though one fails."""
    found = {}

    def judge(task: Task, cost: Cost) -> pd.DataFrame | Sensitivity:
        return task(dataclasses.replace(run, cost=cost))

    for k, (name, task) in enumerate(tasks.items(), 1):
        finding = journal.tried(name, partial(judge, task), (k, len(tasks)))
        if finding is not None:
            found[name] = finding
    return found


def evaluated(
    scores: Mapping[str, Scores],
    sensitivity: Sensitivity,
    config: DictConfig,
    journal: Journal,
    one_of_several: bool = False,
) -> Evaluation:
    """Judge scores by the sensitivity, and write the tables."""
    node = config.evaluation
    with journal.stage("evaluation"):
        evaluation = assess(
            scores, sensitivity, list(node.metrics), node.seed_counts, resamples=node.bootstrap,
            seed_spread=one_of_several,
        )  # fmt: skip
        evaluation.save(journal.folder)
    return evaluation


def report(results: Results, config: DictConfig, journal: Journal) -> None:
    """Write what is shown of a run, and log it."""
    results.save(journal.folder)
    study_answer(results).save(journal.folder)
    write_costs(journal.costs, journal.folder / "cost.csv")
    if config.report:
        from fimo.reporting import write_report  # with packages that nothing else needs

        write_report(results, journal.folder / "report.html")
    tell(journal.log, results, journal.folder / "report.html")


def tell_in_short(config: DictConfig, folder: Path) -> None:
    """Print a run's answer, as ``fimo show`` prints it again."""
    log.info("results: %s", folder / "report.html" if config.report else folder)
    print(f"\n{shown(folder)}\n")


def refuse_poor(final_model: FinalModel, data: InstancesModule) -> None:
    """Refuse a final model that predicts worse than a constant; say so where that can't be told.

    Raises:
        InputError: naming the likely causes.
    """
    found = compared(final_model, data.train, data.test)
    if not isinstance(found, Comparison):
        log.info("%s", untold(found))
    elif found.poor is not None:
        raise InputError("model", f"{found.poor} model.accept_poor=true explains it all the same")


def best_agreement(table: pd.DataFrame, metric: str) -> float:
    """Return the best method's mean agreement at the last evaluation point, all seeds averaged."""
    last = table[(table["metric"] == metric) & (table["step"] == table["step"].max())]
    return float(last[last["seeds"] == last["seeds"].max()]["mean"].max())
