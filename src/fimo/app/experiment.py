"""The story of a run: data, final model, gold standard, methods, their agreement, the report."""

from __future__ import annotations

import dataclasses
import logging
import math
import traceback
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from fimo.app.build import (
    build_data,
    build_final_model,
    build_methods,
    build_module,
    build_trainer,
    check_evaluation,
    training_settings,
)
from fimo.app.check_run import check_run
from fimo.app.config import plain
from fimo.app.environment import quiet_libraries, trainer_settings
from fimo.app.plan import Plan
from fimo.app.scoring import Scoring, applicable
from fimo.app.summary import summarise
from fimo.cost import Cost, measured, write_costs
from fimo.curvature.solvers import DivergenceError
from fimo.data.datamodule import InstancesModule
from fimo.errors import InputError, reason
from fimo.evaluation import assess
from fimo.further_training import further_train
from fimo.models.final_model import FinalModel
from fimo.models.frozen import without_frozen_part
from fimo.models.training import quality, save_checkpoint, train_final_model
from fimo.reporting.wandb import log_run
from fimo.scores import Scores
from fimo.store.description import Indescribable
from fimo.store.files import Store
from fimo.tasks import Judged, build_tasks, with_findings
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
    store = Store(config.store)
    costs: list[Cost] = []

    data = build_data(config)
    plan = Plan.of(config, data)
    check_evaluation(config, len(plan.seeds))
    module = build_module(config, data)
    methods, skipped = applicable(
        build_methods(config), build_final_model(module, config), data.train, plan.protocol
    )
    for name, why in skipped.items():
        log.warning("%s is skipped: %s", name, why)
    tasks = build_tasks(config, data)
    trainer = build_trainer(config)
    device = trainer.strategy.root_device

    with measured("final_model") as cost:
        if config.model.checkpoint is None:
            train_final_model(module, data, trainer, store, training_settings(config), config.seed, cost)
        final_model = build_final_model(module, config)
        save_checkpoint(module, trainer, run_dir / "final_model.ckpt")
        final_quality = quality(final_model, data)
    costs.append(cost)
    if not math.isfinite(final_quality.train_loss):
        raise InputError("model", f"the final model's loss is {final_quality.train_loss}; lower model.lr?")
    log.info("final model: %s", final_quality)
    trained, seen = without_frozen_part(final_model, data)  # what no run changes is computed once

    if config.until == "check":
        check_run(trained, seen, plan, methods, device, run_dir)
        write_costs(costs, run_dir / "cost.csv")
        return math.nan

    if not config.model.accept_poor:
        refuse_poor(final_model, data)
        trained = dataclasses.replace(trained, accept_poor=True)  # not to be judged again with every part
    scoring = Scoring.of(trained, seen, plan, config.seed, store, device)
    with measured("further_training") as cost:
        sensitivity = further_train(
            trained,
            seen.train,
            seen.test[plan.test],
            plan.protocol,
            plan.seeds,
            plan.left_out,
            test_index=plan.test,
            store=store,
            chunk=plan.chunk,
            subtract_mean=plan.subtract_mean,
            trainer=trainer_settings(config),
            cost=cost,
            problem=None if isinstance(scoring.problem, Indescribable) else scoring.problem,
        )
        sensitivity.save(run_dir / "sensitivity.safetensors", with_raw=config.further_training.save_raw)
    costs.append(cost)
    check_finite(sensitivity.sensitivity)
    if config.until == "further_training":
        write_costs(costs, run_dir / "cost.csv")
        return math.nan

    settings = plain(config.methods)
    scores: dict[str, Scores] = {}
    for name, method in methods.items():
        with measured(name) as cost:
            try:
                scores[name] = scoring.scores(name, method, settings[name], cost)
            except OSError:  # a full disk fails everything that follows too
                raise
            except Exception as error:  # whatever it is, the others' results are not lost with it
                problem = failure(name, error, run_dir)
                if len(methods) == 1:
                    raise InputError(f"methods.{name}", problem) from error
                log.error("%s failed: %s", name, problem)
                skipped[name] = f"failed: {problem}"
                continue
            scores[name].save(run_dir / "scores" / f"{name}.safetensors")
        costs.append(cost)
        log.info("%s: %.1f s", name, cost.seconds)

    methods = {name: method for name, method in methods.items() if name in scores}
    if not scores:
        raise InputError("method", "; ".join(f"{name} {why}" for name, why in skipped.items()))

    findings = {}
    for name, task in tasks.items():
        with measured(name) as cost:
            try:
                findings[name] = task(Judged(config, data, plan, final_model, methods, store, device, cost))
            except OSError:
                raise
            except Exception as error:  # what was measured and scored before is still judged and reported
                problem = failure(name, error, run_dir)
                log.error("%s failed: %s", name, problem)
                skipped[name] = f"failed: {problem}"
                continue
        costs.append(cost)
        log.info("%s: %.1f s", name, cost.seconds)

    with measured("evaluation") as cost:
        evaluation = assess(
            scores,
            sensitivity,
            list(config.evaluation.metrics),
            config.evaluation.seed_counts,
            resamples=config.evaluation.bootstrap,
        )
        evaluation.save(run_dir)
    costs.append(cost)

    with measured("report") as cost:
        results = summarise(
            plain(config), data, final_model, final_quality, sensitivity, methods, scores, evaluation,
            costs, skipped,
        )  # fmt: skip
        results = with_findings(results, findings, run_dir, tasks)
        results.save(run_dir)
        write_costs(costs, run_dir / "cost.csv")
        if config.report:
            from fimo.reporting import write_report  # with packages that nothing else needs

            write_report(results, run_dir / "report.html")
        log_run(results, config.logger, run_dir)
    write_costs([*costs, cost], run_dir / "cost.csv")
    for note in evaluation.notes:
        log.warning("%s", note)
    log.info("results: %s", run_dir / "report.html" if config.report else run_dir)
    return best_agreement(evaluation.table, config.evaluation.metrics[0])


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


def failure(name: str, error: Exception, run_dir: Path) -> str:
    """Return a method's failure in one line; its traceback is in ``failures/`` where it needs one."""
    if isinstance(error, InputError | DivergenceError):
        return str(error).splitlines()[0]
    path = run_dir / "failures" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(traceback.format_exception(error)))
    return f"{reason(error)}; the traceback is in {path}"


def check_finite(sensitivity: Tensor) -> None:
    """Warn of runs that diverged, and end where nothing is left to compare with.

    Args:
        sensitivity: ``[E, J, L]``.

    Raises:
        InputError: none is finite at the last evaluation point.
    """
    finite = torch.isfinite(sensitivity)
    if not finite[-1].any():
        raise InputError("further_training.lr", "all runs diverged: no loss change is finite; lower it?")
    if not finite.all():
        share = 1 - float(finite.float().mean())
        log.warning("further training diverged in part: %.1f %% of it is not finite", 100 * share)


def best_agreement(table: pd.DataFrame, metric: str) -> float:
    """Return the best method's mean agreement at the last evaluation point, all seeds averaged."""
    last = table[(table["metric"] == metric) & (table["step"] == table["step"].max())]
    return float(last[last["seeds"] == last["seeds"].max()]["mean"].max())
