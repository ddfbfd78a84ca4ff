"""What the library offers under one name: the functions of ``import fimo``."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pandas as pd
import torch
from torch import Tensor

from fimo.cost import Cost, cost_table
from fimo.curvature.shared_rows import shared_rows
from fimo.data.conversion import train_and_test
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.further_training.gold_standard import evaluation_points
from fimo.further_training.gold_standard import further_train as _further_train
from fimo.further_training.sensitivity import Sensitivity, check_finite
from fimo.further_training.trajectory import FurtherTraining
from fimo.further_training.trajectory_recorder import full_runs
from fimo.methods.catalogue import method_of
from fimo.models.final_model import FinalModel
from fimo.models.measured import Measured
from fimo.models.state import one_call
from fimo.scores import Scores
from fimo.store.description import describe
from fimo.store.files import Store
from fimo.store.fingerprint import data_hash
from fimo.validation import choices
from fimo.validation.admission import admit

if TYPE_CHECKING:
    from fimo.audit.result import Audit
    from fimo.data.origin import Origin
    from fimo.methods.base import AttributionMethod
    from fimo.methods.catalogue import Method
    from fimo.reporting.audit_run import AuditRun
    from fimo.reporting.results import Results

Judged = Scores | Tensor | tuple[str, Tensor]


@one_call()
def further_train(
    model: FinalModel,
    train: Any,
    test: Any,
    further_training: Protocol,
    seeds: int | Sequence[int] = 10,
    left_out: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = 50,
    *,
    inputs: str | Sequence[str] | None = None,
    target: str | None = None,
    store: Store | str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Sensitivity:
    """Measure how test losses change when training goes on with and without each left-out instance.

    The gold standard (Wei et al., 2025, arXiv 2412.03906, eqs. 13 and 17): with seed s, at amount e of
    further training, ``raw[s, e, j, l] = loss_j(leaving out l) - loss_j(full)``; the sensitivity is its mean
    over seeds, minus the mean over left-out instances. Positive: removing the instance raises the test loss,
    or what else the model measures in its place.

    Args:
        model: the final model.
        train, test: all N training instances, and the J test instances, in any form of
            :func:`fimo.data.conversion.to_instances`: a Dataset, a DataLoader that does not shuffle, a
            ``datasets.Dataset``, arrays or tensors ``(X, y)``, a DataFrame, Instances.
        further_training: optimizer, learning rate, batch size, amount, leave-out rule.
        seeds: how many (0, 1, ...), or a list of them: S.
        left_out: how many evenly spaced training instances, a list of indices, or of lists that are left out
            together: L; None for all N.
        inputs, target: columns of DataFrames and of mappings.
        store: a folder that keeps runs, so that a killed call goes on where it was.
        device: ``cpu``, ``cuda``, ``cuda:1``.
        progress: show a progress bar.

    Returns:
        The sensitivity ``[E, J, L]`` with the raw changes of each seed, on the CPU.

    Raises:
        InputError: in one line, what can't be right: the argument, what was found, what is allowed; or that
            all runs diverged.

    Example:
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> model = fimo.FinalModel(torch.nn.Linear(3, 1), "mse", accept_poor=True)
        >>> ft = fimo.Protocol(lr=0.05, batch_size=8, epochs=2)
        >>> truth = fimo.further_train(model, (x, x.sum(1)), (x[:5], x[:5].sum(1)), ft, seeds=2, left_out=4)
        >>> truth.sensitivity.shape  # two evaluation points, five test instances, four left out
        torch.Size([2, 5, 4])
    """
    if not isinstance(further_training, Protocol):
        raise InputError("further_training", _no_protocol(further_training))
    choices.device(device)
    train, test = admit(model, *train_and_test(train, test, inputs, target, ("train", "test")))
    found = _further_train(
        model,
        train,
        test,
        further_training,
        seeds,
        left_out,  # type: ignore[arg-type]
        store=_store(store),
        trainer={**_trainer(device), "enable_progress_bar": progress},
    )
    check_finite(found.sensitivity)
    return replace(found, **_hashes(model, train, test), measured=Measured.supposed(model))


@overload
def attribute(
    model: FinalModel, train: Any, test: Any, method: Method = "best",
    left_out: int | Sequence[int] | Tensor | None = None, *,
    further_training: Protocol | FurtherTraining | None = None, seeds: int | Sequence[int] = 10,
    extremes: int | None = None, inputs: str | Sequence[str] | None = None, target: str | None = None,
    store: Store | str | Path | None = None, device: str | torch.device = "cpu", **settings: Any,
) -> Scores: ...  # fmt: skip
@overload
def attribute(
    model: FinalModel, train: Any, test: Any, method: list[Any] | tuple[Any, ...],
    left_out: int | Sequence[int] | Tensor | None = None, *,
    further_training: Protocol | FurtherTraining | None = None, seeds: int | Sequence[int] = 10,
    extremes: int | None = None, inputs: str | Sequence[str] | None = None, target: str | None = None,
    store: Store | str | Path | None = None, device: str | torch.device = "cpu", **settings: Any,
) -> dict[str, Scores]: ...  # fmt: skip
@one_call()
def attribute(
    model: FinalModel,
    train: Any,
    test: Any,
    method: Method | list[Any] | tuple[Any, ...] = "best",
    left_out: int | Sequence[int] | Tensor | None = None,
    *,
    further_training: Protocol | FurtherTraining | None = None,
    seeds: int | Sequence[int] = 10,
    extremes: int | None = None,
    inputs: str | Sequence[str] | None = None,
    target: str | None = None,
    store: Store | str | Path | None = None,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> Scores | dict[str, Scores]:
    """Attribute the losses of test instances to training instances.

    Args:
        model: the final model.
        train, test: as for :func:`further_train`.
        method: a name (:func:`methods` lists them), a class, or an object; or a list of these, which share
            the gradients that they take.
        left_out: training indices to score; None for all N, a number for so many evenly spaced.
        further_training: what the scores are to predict, for methods that follow it (``best``, ``response``,
            ``calibrated``, ``source``, ``unrolled``) or are damped to match it.
        seeds: whose full runs such methods follow: how many, or a list. A comparison with a gold standard is
            fair with other seeds than its own: ``seeds=fimo.other_seeds(truth.seeds)``.
        extremes: return only the scores of training instances that are among so many with the highest or the
            lowest of a test instance, or of the mean over all: what :meth:`Scores.top` names. ``logra``,
            ``less`` and ``trak`` find them without the others' scores in memory.
        inputs, target: columns of DataFrames and of mappings.
        store: a folder that keeps full runs.
        device: where everything is computed.
        settings: arguments of the method, where it is a name or a class: ``damping="10x"``; of all, where
            several are asked for.

    Returns:
        Scores ``[J, L]``, or ``[E, J, L]`` with standard errors where the method follows further training; on
        the CPU. Positive: removing the training instance raises the test loss, or what else the model
        measures. Of a list of methods, each one's by its name, with the seconds that it takes alone.

    Raises:
        InputError: an unknown method or setting, one that does not apply to this model, and as
            :func:`further_train`.

    Example:
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> model = fimo.FinalModel(torch.nn.Linear(3, 1), "mse", accept_poor=True)
        >>> scores = fimo.attribute(model, (x, x.sum(1)), (x[:5], x[:5].sum(1)), method="graddot")
        >>> scores.values.shape
        torch.Size([5, 40])
    """
    chosen = _methods(method, settings)
    where = choices.device(device)
    if not isinstance(further_training, Protocol | FurtherTraining | None):
        raise InputError("further_training", _no_protocol(further_training))
    given = train_and_test(train, test, inputs, target, ("train", "test"))
    train_instances, test_instances = admit(model, *given)
    if where.type != "cpu":
        model, train_instances = model.to(where), train_instances.to(where)
        test_instances = test_instances.to(where)
    for name, each in chosen.items():
        if (why := each.inapplicable(model, train_instances)) is not None:
            raise InputError("method", f"{name} does not apply here: {why}")
        each.load()
    if isinstance(further_training, Protocol):
        further_training = followed(model, train_instances, further_training, seeds, store)
    indices = choices.indices(left_out, len(train_instances), "left_out")
    same = extremes is None and _same_instances(test_instances, train_instances, indices)
    hashes, found = _hashes(model, train_instances, test_instances), {}
    with shared_rows(model) if len(chosen) > 1 else nullcontext() as shared:
        for name, each in chosen.items():
            began, spared = time.perf_counter(), shared.seconds if shared else 0.0
            scores = each.attribute(
                model, train_instances, test_instances, left_out, further_training, extremes
            )
            scores = scores.to("cpu")
            seconds = time.perf_counter() - began + (shared.seconds - spared if shared else 0.0)
            found[name] = replace(scores, method=name, of_themselves=same, seconds=seconds, **hashes)
    return found if isinstance(method, list | tuple) else found[name]


@one_call()
def audit(
    model: FinalModel,
    train: Any,
    test: Any,
    further_training: Protocol,
    *,
    tests: int | str | Sequence[int | str] = (),
    top: int = 20,
    q: float = 0.1,
    verify: bool = True,
    minutes: float | None = None,
    seeds: int = 10,
    controls: int | None = None,
    certain_labels: bool = False,
    act: bool = True,
    names: Origin | Sequence[Any] | None = None,
    test_names: Origin | Sequence[Any] | None = None,
    inputs: str | Sequence[str] | None = None,
    target: str | None = None,
    store: Store | str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Audit:
    """Say which of all training rows matter, surely.

    Every row's effect on the mean test loss (and on the losses of the test instances named by ``tests``) is
    predicted; the rows with the largest predictions are then left out of real further training, with as many
    random ones, until the signs of their effects are known at a false discovery rate of ``q``.

    Args:
        model, train, test, further_training, inputs, target, store, device, progress: as for
            :func:`fimo.further_train`.
        tests: test instances that are explained one by one, by name or position (``"row 3"`` where names are
            numbers); not of several outputs.
        top: rows of interest on each side of each target; half as many more are verified.
        q: false discovery rate at which verdicts shall hold.
        verify: make real runs; else only predictions.
        minutes: no further round of seeds is begun that would end later.
        seeds: most seeds with which a row is left out; predictions follow as many others.
        controls: random rows that are left out besides; twice ``top`` when None.
        certain_labels: a row's inputs leave no doubt of its label, as of digits that a person can read: more
            rows are then listed as suspects.
        act: leave groups of rows out as well, and together the rows behind the predictions of ``tests``, and
            prove what cleaning is worth.
        names, test_names: of the rows, as a list or an :class:`~fimo.data.origin.Origin`; a DataFrame's index
            where it is no plain range, else their positions.

    Returns:
        ``.rows`` with one line for each of the N training rows, ``.pairs``, ``.summary`` …; see
        :class:`~fimo.audit.result.Audit`. Positive effects: removing the row raises the test loss.

    Raises:
        InputError: as :func:`fimo.further_train`; or, with ``audit.KEY``, a setting that can't be.

    Example:
        >>> x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
        >>> model = fimo.FinalModel(torch.nn.Linear(3, 1), "mse", accept_poor=True)
        >>> ft = fimo.Protocol(lr=0.05, batch_size=8, epochs=2)
        >>> found = fimo.audit(model, (x, x.sum(1)), (x[:5], x[:5].sum(1)), ft, top=3, seeds=4)
        >>> len(found.rows), len(found.rows[found.rows["verdict"] != ""])
        (60, 16)
    """
    # with packages that attribution does without
    from fimo.audit.audit import audit as _audit
    from fimo.audit.question import Question, Resources, Settings, origin_of, positions
    from fimo.audit.reading import shown_rows

    if not isinstance(further_training, Protocol):
        raise InputError("further_training", _no_protocol(further_training))
    choices.device(device)
    settings = Settings(top, q, verify, minutes, seeds, controls, certain_labels, act)
    given = (train, test)
    train, test = admit(model, *train_and_test(train, test, inputs, target, ("train", "test")))
    train_origin = origin_of(names, given[0], len(train), "names")
    test_origin = origin_of(test_names, given[1], len(test), "test_names")
    asked = positions(tests, test_origin, "audit.test")
    question = Question(
        model, train, test, further_training, asked, train_origin, test_origin,
        read=shown_rows(given[0], train),
    )  # fmt: skip
    trainer = {**_trainer(device), "enable_progress_bar": progress}
    return _audit(question, settings, Resources(_store(store), torch.device(device), trainer))


@one_call()
def evaluate(
    scores: Mapping[str, Judged], truth: Sensitivity, metrics: Sequence[str] | None = None
) -> pd.DataFrame:
    """Judge scores by the sensitivity, beside the ceilings that its number of seeds allows.

    Args:
        scores: by name: :class:`Scores`, or tensors or arrays ``[J, L]`` or ``[E, J, L]`` of one's own.
            Scores of all N training instances are judged on those that the gold standard left out.
        truth: the gold standard, of the same final model, training and test instances.
        metrics: of ``cosine``, ``spearman``, ``pearson``, …; the usual ones when None.

    Returns:
        One row for each method, metric, evaluation point and number of seeds averaged:
        ``method,access,metric,step,epoch,seeds,mean,sem,ceiling,ceiling_lower,followed_seeds``; mean and
        standard error over test instances.

    Raises:
        InputError: shapes that don't fit, scores of something else, an unknown metric.

    Example:
        >>> raw = torch.randn(4, 1, 3, 8, generator=torch.Generator().manual_seed(0))
        >>> axes = {"step": torch.tensor([9]), "epoch": torch.tensor([1]), "left_out": torch.arange(8)}
        >>> truth = fimo.Sensitivity(raw, **axes, test=torch.arange(3), seeds=torch.arange(4))
        >>> table = fimo.evaluate({"itself": truth.sensitivity[0]}, truth)
        >>> float(table.query("metric == 'cosine' and seeds == 4")["mean"].iloc[0])
        1.0
    """
    choices.device("cpu")
    if not isinstance(scores, Mapping):
        raise InputError(
            "scores", f"expected scores by name, {{'ekfac': scores}}, but got {type(scores).__name__}"
        )
    if not isinstance(truth, Sensitivity):
        raise InputError("truth", f"expected what further_train returns but got {type(truth).__name__}")
    metrics = [metrics] if isinstance(metrics, str) else metrics
    from fimo.evaluation import COLUMNS, METRICS, assess  # torchmetrics takes seconds to import

    judged = {name: _judged(name, found) for name, found in scores.items()}
    return assess(judged, truth, tuple(metrics or METRICS), resamples=0).table[COLUMNS]  # type: ignore[arg-type]


def _judged(name: str, found: Any) -> Scores | tuple[str, Tensor]:
    if isinstance(found, Scores | tuple):
        return found
    key = f"scores of {name}"
    if isinstance(found, pd.DataFrame):
        found = found.to_numpy()
    values = choices.real_numbers(found, key, "Scores or an array")
    if len(bad := (~values.isfinite()).nonzero()):
        at = bad[0].tolist()
        raise InputError(key, f"{len(bad)} of {values.numel()} are NaN or infinite, the first at {at}")
    return "", values


def load_run(folder: str | Path) -> Results:
    """Read the results of a finished run of the command line.

    Returns:
        ``.sensitivity``, ``.scores`` by method, ``.evaluation``, ``.cost``, ``.final_model``, ``.config`` ...

    Raises:
        InputError: a file is missing, so that this is no folder of a finished run.
    """
    from fimo.reporting.results import Results

    return Results.load(folder)


def report(
    what: Results | Sequence[Results] | Scores | Mapping[str, Scores] | Audit | AuditRun,
    path: str | Path = "report.html",
    truth: Sensitivity | None = None,
    *,
    train: pd.DataFrame | None = None,
    test: pd.DataFrame | None = None,
) -> Path:
    """Write a report that opens offline.

    Args:
        what: a run (:func:`load_run`), several to be overlaid, scores by name, or an audit.
        path: of the page.
        truth: the gold standard, where ``what`` are scores.
        train, test: the tables that were audited, to show their values; a data row is a position in them.

    Returns:
        Where the page is.

    Raises:
        InputError: scores without ``truth``, or packages of the extra ``figures`` that are missing.
    """
    from fimo.audit.result import Audit
    from fimo.reporting import AuditRun, write_audit_report, write_report
    from fimo.reporting.results import Results

    if isinstance(what, Audit):
        what = AuditRun.of_frames(what, train, test)
    if isinstance(what, AuditRun):
        return write_audit_report(what, Path(path))
    if isinstance(what, Scores):
        what = {what.method or "scores": what}
    if isinstance(what, Results):
        runs = [what]
    elif isinstance(what, Mapping):
        if truth is None:
            raise InputError(
                "truth", "a report of scores compares them with a gold standard, fimo.further_train"
            )
        runs = [_results(what, truth)]
    else:
        runs = list(what)
    return write_report(runs, Path(path))


def followed(
    model: FinalModel,
    train: Any,
    protocol: Protocol,
    seeds: int | Sequence[int] = 10,
    store: Store | str | Path | None = None,
) -> FurtherTraining:
    """Return further training as methods follow it: its seeds' full runs are made when they are asked for."""
    train, _ = admit(model, train)
    numbers = choices.seeds(seeds, "seeds")
    steps = tuple(int(s) for s in evaluation_points(protocol, len(train))[0])
    place = _store(store)
    runs = functools.partial(
        full_runs, model, train, protocol, numbers, store=place, device=train.targets.device
    )
    return FurtherTraining(protocol, steps, tuple(numbers), runs)


def _no_protocol(given: Any) -> str:
    return f"expected a fimo.Protocol(optimizer=..., lr=..., epochs=...) but got {given!r}"


def _store(store: Store | str | Path | None) -> Store | None:
    return Store(store) if isinstance(store, str | Path) else store


def _trainer(device: str | torch.device) -> dict[str, Any]:
    where = torch.device(device)
    if where.type == "cpu":
        return {"accelerator": "cpu", "devices": 1}
    return {"accelerator": "gpu" if where.type == "cuda" else where.type, "devices": [where.index or 0]}


def _hashes(model: FinalModel, train: Instances, test: Instances) -> dict[str, Any]:
    """Return hashes of what is explained, the same for a model in another precision.

    Of many training instances a sample stands for all: what matters is that an index means the same one.
    """
    rows = torch.tensor(choices.spaced(min(SAMPLE, len(train)), len(train)))
    some = train[rows.to(train.targets.device)].to("cpu", torch.float32)
    state = {name: t.float().cpu() if t.is_floating_point() else t.cpu() for name, t in model.state().items()}
    return {
        "test_hash": data_hash(test.to("cpu", torch.float32)),
        "train_hash": describe([len(train), data_hash(some)], "train"),
        "model_hash": describe(state, "model"),
    }


SAMPLE = 4096
"""Training instances whose content is hashed."""


def _methods(
    method: Method | list[Any] | tuple[Any, ...], settings: Mapping[str, Any]
) -> dict[str, AttributionMethod]:
    several = method if isinstance(method, list | tuple) else [method]
    if not several:
        raise InputError("method", "expected a method or some but got an empty list")
    found: dict[str, AttributionMethod] = {}
    for one in several:
        name, made = method_of(one, settings)
        if name in found:
            raise InputError("method", f"two are called {name!r}; ask for each by itself")
        found[name] = made
    return found


def _same_instances(test: Any, train: Any, indices: Tensor) -> bool:
    """Return whether the test instances are the left-out ones, in their order."""
    if len(test) != len(indices):
        return False
    ours, theirs = test.tensors(), train[indices.to(train.targets.device)].tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def _results(scores: Mapping[str, Scores], truth: Sensitivity) -> Results:
    """Return what a report shows of scores that were computed in Python."""
    from fimo.evaluation import assess
    from fimo.evaluation.assessment import aligned
    from fimo.reporting.results import Results

    judged = {name: aligned(found, truth, name) for name, found in scores.items()}
    evaluation = assess(judged, truth)
    of_scores = (found.measured for found in scores.values() if found.measured is not None)
    measured = truth.measured or next(of_scores, Measured())
    return Results(
        name=", ".join(scores),
        sensitivity=truth,
        scores=judged,
        evaluation=evaluation.table,
        cost=cost_table(
            [
                Cost(name, found.seconds, gradient_evaluations=found.gradient_evaluations)
                for name, found in scores.items()
                if not math.isnan(found.seconds)
            ]
        ),
        warnings=(*evaluation.notes, *([] if measured.known else [measured.unknown])),
        bootstrap=evaluation.bootstrap,
        slopes=evaluation.slopes,
        measured=measured,
    )
