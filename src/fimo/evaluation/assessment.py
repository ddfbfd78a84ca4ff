"""Judge methods' scores by the sensitivity: one table, with its uncertainty beside it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.evaluation.bootstrap import bootstrap_agreement
from fimo.evaluation.ceiling import ceiling_undefined, noise_ceilings, not_enough_seeds
from fimo.evaluation.metrics import DEFAULT, MetricName, check_shapes, mean_and_sem
from fimo.evaluation.over_models import SeedSpread, seed_spreads
from fimo.evaluation.resampling import mean_agreements
from fimo.evaluation.slope import fitted_slope
from fimo.further_training.seeds import relation
from fimo.further_training.sensitivity import Sensitivity, adjust
from fimo.scores import Scores
from fimo.store.files import written_aside

COLUMNS = [
    "method", "access", "metric", "step", "epoch", "seeds", "mean", "sem", "ceiling", "ceiling_lower",
    "followed_seeds", "final_models", "sem_models",
]  # fmt: skip

AnyScores = Mapping[str, Scores | tuple[str, Tensor]]
"""By method: its scores; or its access level (``FiMO``, ``CPA``, ``TAA``) and their values ``[J, L]`` or
``[E, J, L]``."""


@dataclass(frozen=True)
class Evaluation:
    """How well methods agree with the sensitivity.

    Args:
        table: ``evaluation.csv``, columns :data:`COLUMNS`; mean and SEM over test instances, of one final
            model (see :mod:`fimo.evaluation.several_models` for the mean over several).
        bootstrap: ``method,metric,step,epoch,seeds,mean,low,high,undefined,instances``: 95 % intervals over
            seeds and test instances, and how many of the instances' agreements are undefined.
        slopes: ``method,step,epoch,slope``, for methods that estimate a loss change.
        instances: agreement ``[E, J]`` by ``(method, metric, seeds)``, the number of seeds averaged.
        notes: what a reader must know: too few seeds (by the upper ceiling of the first metric after all
            further training), undefined values, no ceiling.
        spreads: by ``(method, metric)``, how the agreement varies with seeds, where that was asked for.
    """

    table: pd.DataFrame
    bootstrap: pd.DataFrame
    slopes: pd.DataFrame
    instances: Mapping[tuple[str, str, int], Tensor]
    notes: tuple[str, ...] = ()
    spreads: Mapping[tuple[str, str], SeedSpread] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``evaluation.csv``, ``evaluation_bootstrap.csv`` and ``evaluation_slopes.csv``."""
        frames = {"": self.table, "_bootstrap": self.bootstrap, "_slopes": self.slopes}
        for suffix, frame in frames.items():
            with written_aside(folder / f"evaluation{suffix}.csv") as path:
                frame.to_csv(path, index=False)


def evaluate(
    scores: AnyScores,
    sensitivity: Sensitivity,
    metrics: Sequence[MetricName] = DEFAULT,
    seed_counts: Sequence[int] | None = None,
    estimate_loss_change: Collection[str] | None = None,
    followed: Mapping[str, Sequence[int]] | None = None,
) -> pd.DataFrame:
    """Return one row per method, metric, evaluation point and number of seeds averaged.

    Columns :data:`COLUMNS`; scores are judged as a run from the command line judges them, see
    :func:`assess`.
    """
    return assess(
        scores, sensitivity, metrics, seed_counts, estimate_loss_change, followed, resamples=0
    ).table


def assess(
    scores: AnyScores,
    sensitivity: Sensitivity,
    metrics: Sequence[MetricName] = DEFAULT,
    seed_counts: Sequence[int] | None = None,
    estimate_loss_change: Collection[str] | None = None,
    followed: Mapping[str, Sequence[int]] | None = None,
    resamples: int = 100,
    subsets: int = 10,
    seed: int = 0,
    seed_spread: bool = False,
) -> Evaluation:
    """Judge scores by the sensitivity, with intervals, slopes and every test instance's agreement.

    Args:
        scores: by method, of the sensitivity's test instances, and of its left-out instances or of more (such
            as all training instances). Instead of scores, a pair of access level and values.
        seed_counts: numbers k of seeds averaged; 1, 2, 5, 10, 20, 50, … and all S when None. For k < S a
            test instance's agreement is its mean over about ``subsets`` subsets of k seeds, disjoint where
            they were cut from one random order; the SEM is over test instances only, since subsets of
            the same seeds are no independent samples.
        estimate_loss_change: methods whose scores are in units of loss, for which a slope is fitted. Those of
            them that follow further training (``[E, J, L]``) predict its raw changes, so their scores are
            adjusted just as the sensitivity is, see :func:`adjusted_scores`. When None: as scores say; of
            pairs, those that give ``[E, J, L]``.
        followed: by method, the seeds whose runs it followed, for the column ``followed_seeds``: ``other``
            where the gold standard has none of them, ``same`` where it has some, so that the method knows
            part of its noise and may pass the ceiling; ``none`` for methods that follow no run. When None:
            as :class:`Scores` say; of pairs it is ``unknown`` for ``[E, J, L]``.
        resamples: of the bootstrap; none when 0.
        seed: of all randomness here.
        seed_spread: also measure how agreement varies with the seeds, as several final models' components of
            variance need it; it takes S more means over seeds.

    Raises:
        InputError: no scores, scores of another shape, an unknown metric, a number of seeds out of range.
    """
    if not scores:
        raise InputError("method", "there are no scores to evaluate")
    entries = {
        name: _entry(name, given, sensitivity, estimate_loss_change, followed)
        for name, given in scores.items()
    }
    total = len(sensitivity.seeds)
    counts = sorted(set(seed_counts)) if seed_counts else default_seed_counts(total)
    truth = sensitivity.sensitivity
    judged = {
        name: adjusted_scores(entry.values, entry.predicts_loss_change, sensitivity.subtract_mean)
        for name, entry in entries.items()
    }
    generator = torch.Generator().manual_seed(seed)
    points = {"step": sensitivity.step.tolist(), "epoch": sensitivity.epoch.tolist()}
    rows: list[pd.DataFrame] = []
    bounds: list[pd.DataFrame] = []
    instances: dict[tuple[str, str, int], Tensor] = {}
    spreads: dict[tuple[str, str], SeedSpread] = {}
    notes: list[str] = []
    for metric in metrics:
        raw, adjusted = sensitivity.raw, sensitivity.subtract_mean
        ceilings = noise_ceilings(raw, metric, adjusted, [*counts, total], generator=generator)
        if metric == metrics[0] and (said := not_enough_seeds(ceilings.upper[-1, -1].item(), total, metric)):
            notes.append(said)
        chosen = {k: seed_subsets(total, k, subsets, generator) for k in counts if k < total}
        found = mean_agreements(judged, raw, {**chosen, total: [range(total)]}, metric, adjusted)
        intervals = bootstrap_agreement(judged, raw, metric, adjusted, resamples, generator=generator)
        if seed_spread:
            spread = seed_spreads(judged, raw, found[total], metric, adjusted)
            spreads |= {(name, metric): one for name, one in spread.items()}
        for name, full in found[total].items():
            for k, means in found.items():  # not views of all counts' and methods'
                instances[name, metric, k] = means[name].clone()
            fixed = {
                "method": name,
                "access": entries[name].access,
                "metric": metric,
                "followed_seeds": entries[name].followed,
            }
            for column, k in enumerate(counts):
                numbers = {
                    **_mean_columns(found[k][name]),
                    "ceiling": ceilings.upper[:, column].tolist(),
                    "ceiling_lower": ceilings.lower[:, column].tolist(),
                    "final_models": 1,
                    "sem_models": math.nan,
                }
                rows.append(pd.DataFrame({**fixed, **points, "seeds": k, **numbers}))
            low, high = intervals[name]
            numbers = {"mean": _mean_columns(full)["mean"], "low": low.tolist(), "high": high.tolist()}
            defined = {"undefined": full.isnan().sum(-1).tolist(), "instances": full.shape[-1]}
            bounds.append(
                pd.DataFrame(
                    {"method": name, "metric": metric, **points, "seeds": total, **numbers, **defined}
                )
            )
    slopes = [
        pd.DataFrame({"method": name, **points, "slope": fitted_slope(values, truth).tolist()})
        for name, values in judged.items()
        if entries[name].predicts_loss_change
    ]
    return Evaluation(
        table=pd.concat(rows, ignore_index=True)[COLUMNS],
        bootstrap=pd.concat(bounds, ignore_index=True),
        slopes=pd.concat(slopes, ignore_index=True)
        if slopes
        else pd.DataFrame(columns=["method", "step", "epoch", "slope"]),
        instances=instances,
        notes=(*notes, *undefined(instances, total)),
        spreads=spreads,
    )


@dataclass(frozen=True)
class _Entry:
    """A method's scores of a sensitivity's instances.

    Args:
        values: ``[J, L]`` or ``[E, J, L]``.
        followed: ``none``, ``other``, ``same`` or ``unknown``: its seeds beside the gold standard's.
    """

    values: Tensor
    access: str
    predicts_loss_change: bool
    followed: str


def _entry(
    name: str,
    given: Scores | tuple[str, Tensor],
    sensitivity: Sensitivity,
    estimate_loss_change: Collection[str] | None,
    followed: Mapping[str, Sequence[int]] | None,
) -> _Entry:
    """Read what was given, with the two overrides of :func:`assess`."""
    seeds: Sequence[int] | None
    if isinstance(given, Scores):
        values, access = aligned(given, sensitivity, name).values, str(given.access)
        loss_change, seeds = given.predicts_loss_change, given.followed
    else:
        access, values = given
        loss_change = values.ndim == 3
        seeds = None if loss_change else ()
    check_shapes(values, sensitivity.sensitivity, f"scores of {name}")
    if estimate_loss_change is not None:
        loss_change = name in estimate_loss_change
    if followed is not None:
        seeds = followed.get(name, ())
    how = "unknown" if seeds is None else relation(seeds, sensitivity.seeds.tolist())
    return _Entry(values, str(access), bool(loss_change), how)


OTHERS = {
    "test_hash": "explain other test instances than the sensitivity's",
    "train_hash": "are of other training instances than the sensitivity's, or of another order",
    "model_hash": "explain another final model than the sensitivity's; to compare a proxy's: scores.values",
}
"""Where hashes differ."""


def aligned(scores: Scores, sensitivity: Sensitivity, name: str = "method") -> Scores:
    """Return scores of a sensitivity's left-out instances (or groups), chosen from those of more.

    Raises:
        InputError: there are none of some of them, or they are of other test or training instances, of
            another final model or of another measurement.
    """
    for key, other in OTHERS.items():
        if len({getattr(scores, key), getattr(sensitivity, key)} - {""}) > 1:
            raise InputError(f"scores of {name}", f"they {other}")
    ours, theirs = scores.measured, sensitivity.measured
    if ours is not None and theirs is not None and ours != theirs:
        said = f"changes of the test {ours.name}, and the sensitivity is of the test {theirs.name}"
        raise InputError(f"scores of {name}", f"they are {said}")
    if scores.test is not None and not torch.equal(scores.test, sensitivity.test):
        raise InputError(f"scores of {name}", f"they {OTHERS['test_hash']}")
    if scores.step is not None and scores.step.tolist() != sensitivity.step.tolist():
        said = f"{scores.step.tolist()} steps of further training, not {sensitivity.step.tolist()}"
        raise InputError(f"scores of {name}", f"they predict {said}")
    if torch.equal(scores.left_out.cpu(), sensitivity.left_out) and _same(scores.groups, sensitivity.groups):
        return scores
    if scores.groups is not None:
        raise InputError(f"scores of {name}", "they are of other groups than the sensitivity's")
    units = sensitivity.left_out[:, None] if sensitivity.groups is None else sensitivity.groups
    try:
        return scores.grouped([[i for i in unit if i >= 0] for unit in units.tolist()])
    except InputError as error:
        raise InputError(f"scores of {name}", error.problem) from error


def of_all(given: Scores | tuple[str, Tensor], instances: int, name: str) -> Tensor:
    """Return the values ``[J, N]`` or ``[E, J, N]`` of all training instances in their order.

    Raises:
        InputError: there are none of some of them.
    """
    if not isinstance(given, Scores):
        return given[1]
    if len(given.left_out) == instances and given.left_out.tolist() == list(range(instances)):
        return given.values
    try:
        return given.grouped([[i] for i in range(instances)]).values
    except InputError as error:
        raise InputError(f"scores of {name}", error.problem) from error


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other)


def _mean_columns(values: Tensor) -> dict[str, list[float]]:
    """Return mean and SEM over test instances as columns of a table."""
    mean, sem = mean_and_sem(values)
    return {"mean": mean.tolist(), "sem": sem.tolist()}


def adjusted_scores(scores: Tensor, loss_change: bool, subtract_mean: bool) -> Tensor:
    """Return scores as they are judged.

    A method that predicts the raw change at each amount of further training predicts the adjusted change by
    the same adjustment (eq. 17 is linear); left as it is, its cosine would be lowered by a mean over left-out
    instances that it predicts rightly and the gold standard leaves out. All other scores are judged as the
    paper judges them: unadjusted.

    Args:
        scores: ``[J, L]`` or ``[E, J, L]``.
        loss_change: whether they are in units of loss.
        subtract_mean: whether the sensitivity is adjusted.
    """
    return adjust(scores, subtract_mean) if loss_change and scores.ndim == 3 else scores


def default_seed_counts(seeds: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, … below S, and S."""
    below = [m * 10**p for p in range(6) for m in (1, 2, 5) if m * 10**p < seeds]
    return [*below, seeds]


def seed_subsets(seeds: int, k: int, least: int, generator: torch.Generator) -> list[list[int]]:
    """Return at least ``least`` subsets of k seeds: random orders cut into disjoint pieces of k.

    Fewer where there are fewer in all (k = 1: each seed once).
    """
    if k == 1:
        return [[s] for s in range(seeds)]
    chosen: dict[tuple[int, ...], list[int]] = {}
    for _ in range(least):
        order = torch.randperm(seeds, generator=generator).tolist()
        for start in range(0, seeds - k + 1, k):
            piece = sorted(order[start : start + k])
            chosen.setdefault(tuple(piece), piece)
        if len(chosen) >= least:
            break
    return list(chosen.values())


def undefined(instances: Mapping[tuple[str, str, int], Tensor], seeds: int) -> tuple[str, ...]:
    """Return what is undefined of agreements with the mean over so many seeds: ceiling, instances."""
    notes = [reason] if (reason := ceiling_undefined(seeds)) else []
    for (name, metric, averaged), values in instances.items():
        if averaged == seeds and (count := int(values.isnan().sum())):
            notes.append(
                f"{name}: {metric} is undefined for {count} of {values.numel()} test instances and "
                "evaluation points (constant or non-finite vectors); means are over the others"
            )
    return tuple(notes)
