"""Response of further training to leaving an instance out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.kernel import MAX_DIMENSION, KernelSpectrum, kernel_dimension
from fimo.curvature.kronecker import MAX_EXACT_OUTPUTS, fit_factors
from fimo.data.instances import Instances
from fimo.dynamics.kronecker_response import kronecker_response
from fimo.dynamics.optimizer import preconditioner
from fimo.dynamics.output_space import MAX_OUTPUTS, SATURATING, OutputSpace
from fimo.dynamics.points import Segment, mean_of, midpoint, segments, spread
from fimo.dynamics.relaxation import relaxation, times
from fimo.dynamics.response import (
    Along,
    Kernel,
    linear_loss_changes,
    loss_changes,
    moved,
    outputs_along,
    outputs_at,
    responses,
    with_parameters,
)
from fimo.dynamics.threads import side_by_side
from fimo.errors import InputError
from fimo.further_training.linear import linear_layers
from fimo.further_training.protocol import DTYPES, Protocol
from fimo.further_training.trajectory import FurtherTraining, Trajectory
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel
from fimo.models.losses import mean_squared_error

log = logging.getLogger(__name__)

KNOTS = 32
"""Points of a trajectory at which training outputs are computed; linear in between."""

TOGETHER = 8
"""Most seeds that are followed together, as one batched computation on one thread."""

KERNEL_SHARE = 0.01
"""Of the gold standard's arithmetic, spent on kernels."""


class FollowingMethod(AttributionMethod):
    """A method whose scores are predictions for the given further training, averaged over its seeds.

    Attributes:
        score_sem: ``[E, J, L]`` after :meth:`attribute`, the standard error of the scores from their spread
            over seeds; None with one seed, or where no seed's run is followed.
    """

    estimates_loss_change: ClassVar[bool] = True
    follows_further_training = True
    score_sem: Tensor | None = None

    def attribute(
        self,
        final_model: FinalModel,
        train: Instances,
        test: Instances,
        left_out: Tensor | None = None,
        further_training: FurtherTraining | None = None,
    ) -> Tensor:
        self.left_out = torch.arange(len(train)) if left_out is None else left_out.cpu()
        self.score_sem = None
        return super().attribute(final_model, train, test, left_out, further_training)

    @property
    def ft(self) -> FurtherTraining:
        if self.further_training is None:
            raise InputError("further_training", f"{type(self).__name__} follows it, but none was given")
        return self.further_training

    def average(self, seeds: Iterator[Tensor]) -> Tensor:
        """Return the mean of each seed's scores ``[E, J, L]``, and keep its standard error."""
        total = squares = None
        count = 0
        for scores in seeds:
            count += 1
            if total is None or squares is None:
                total, squares = torch.zeros_like(scores), torch.zeros_like(scores)
            delta = scores - total
            total += delta / count
            squares += delta * (scores - total)
        assert total is not None
        assert squares is not None
        dtype = next(iter(self.final_model.parameters().values())).dtype
        if count > 1:
            self.score_sem = (squares / (count - 1) / count).sqrt().to(dtype)
        return total.to(dtype)


class Response(FollowingMethod):
    """Predicts further training's loss changes by the linear response along it.

    score[t, j, i] = mean over seeds of loss_j(f + J_j d_t) - loss_j(f), where f are j's outputs and J_j their
    Jacobian in the seed's full run after t steps, and d_t is what leaving i out changes in the parameters, to
    first order (:mod:`fimo.dynamics.response`). In constant curvature G and with mean batches,
    d = phi(G) g_i / N with phi(c) = (1 - exp(-c tau)) / c, tau the sum of learning rates: between one
    gradient step (Grad-Dot, tau -> 0) and the influence function (tau -> infinity).

    Args:
        along: ``path`` follows each seed's full run with its own batches, its residuals and the Jacobians of
            a few points; ``end`` takes everything at the full run's parameters at an evaluation point, with
            mean batches; ``final`` does so at the final model and runs nothing.
        propagate: ``outputs`` evaluates the loss at the changed outputs; ``loss`` takes it as linear in them.
        segments: most points at which ``path`` or ``end`` takes Jacobians.
        kernels: Jacobians of each seed's ``own`` run, or ``shared``: of the seeds' mean parameters; ``auto``
            takes as many, and own ones, as 1 % of the arithmetic of further training without each of the
            left-out instances allows.
        max_rows: most training outputs that are followed; beyond it the less curved directions are dropped.
        memory_mb: of Jacobians held at once.
        form: ``kernel`` between training outputs; ``ekfac``: phi of EK-FAC's eigenvalues instead, with mean
            batches, at the final model or (``path`` and ``end``) at the seeds' mean parameters at the nearest
            of ``segments`` points; ``auto``: the kernel unless outputs (or its eigenproblem) are too many.
    """

    def __init__(
        self,
        along: Literal["path", "end", "final"] = "path",
        propagate: Literal["outputs", "loss"] = "outputs",
        segments: int = 6,
        kernels: Literal["auto", "own", "shared"] = "auto",
        max_rows: int = 3000,
        memory_mb: float = 1024,
        form: Literal["auto", "kernel", "ekfac"] = "auto",
    ) -> None:
        for key, choice, allowed in (
            ("form", form, ("auto", "kernel", "ekfac")),
            ("along", along, ("path", "end", "final")),
            ("propagate", propagate, ("outputs", "loss")),
            ("kernels", kernels, ("auto", "own", "shared")),
        ):
            if choice not in allowed:
                raise InputError(key, f"expected one of {', '.join(allowed)} but got {choice!r}")
        for key, value in (("segments", segments), ("max_rows", max_rows), ("memory_mb", memory_mb)):
            if value < 1:
                raise InputError(key, f"expected at least 1 but got {value}")
        self.along, self.propagate, self.segments = along, propagate, segments
        self.kernels, self.max_rows, self.memory_mb = kernels, max_rows, memory_mb
        self.form = form
        self.loss_changes = loss_changes if propagate == "outputs" else linear_loss_changes

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        return self.too_large(final_model, train) if self.form == "kernel" else None

    def too_large(self, final_model: FinalModel, train: Instances) -> str | None:
        """Return why the kernel form can't be used, or None."""
        outputs = final_model.outputs(train[:1])[0].numel()
        if outputs > MAX_OUTPUTS:
            return f"it follows at most {MAX_OUTPUTS} outputs of an instance, not {outputs}"
        dimension = kernel_dimension(final_model, train)
        if self.along != "path" and dimension > MAX_DIMENSION:
            return f"its eigenproblem is {dimension} x {dimension} (at most {MAX_DIMENSION})"
        return None

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        self.gradient_evaluations = 0
        reason = self.too_large(self.final_model, self.train) if self.form == "auto" else None
        if self.form == "ekfac" or reason:
            log.info("response: EK-FAC's eigenbasis instead of the kernel%s", reason and f", since {reason}")
            return self._by_factors(test, left_out)
        if self.along == "final":
            return self._at_final_model(test, left_out)
        if self.along == "end":
            return self.average(self._at_ends(t, test, left_out) for t in self.ft.full_runs())
        return self.average(self.by_seed(test))

    # -- along="path" ---------------------------------------------------------------------------------

    def by_seed(self, test: Instances, groups: Mapping[int, Tensor] | None = None) -> Iterator[Tensor]:
        """Yield each seed's scores ``[E, J, L + K]`` (float64).

        Args:
            groups: by seed, ``[K, G]`` instances that are left out together, whose scores follow the others.
        """
        for ignored in ignored_parts(self.final_model, self.ft.protocol):
            log.warning("the response ignores %s", ignored)
        dtype = DTYPES[self.ft.protocol.dtype]
        model, train = self.final_model.to(dtype=dtype), self.train.to(dtype=dtype)
        test = test.to(dtype=dtype)
        workers = torch.get_num_threads() if train.targets.device.type == "cpu" else 1
        share, most = self._kernel_plan(test)
        cut = segments(self.ft.steps, most)
        trajectories: Iterator[Trajectory] = self.ft.full_runs()
        first = next(trajectories)
        trajectories = itertools.chain([first], trajectories)
        space = self._space(model, train, first)
        shared: list[Kernel] | None = None
        if share:
            kept = list(trajectories)
            trajectories = iter(kept)
            shared = side_by_side(lambda s: self._kernel(train, test, space, kept, s), cut, workers)

        def follow(runs: Sequence[Trajectory]) -> list[Tensor]:
            own = model.to()
            kernels = iter(shared) if shared is not None else self._own_kernels(train, test, space, runs, cut)
            changes = responses(
                [t.seed for t in runs], self.left_out, len(train), self.ft.protocol, space,
                self._along(own, train, space, runs, cut), self.ft.steps, cut, kernels,
                None if groups is None else torch.stack([groups[t.seed] for t in runs]),
                own.loss, train.targets,
            )  # fmt: skip
            outputs = [outputs_along(own, t.parameters[1:], test) for t in runs]
            found: list[list[Tensor]] = [[] for _ in runs]
            for e, change in enumerate(changes):
                for mine, at, c in zip(found, outputs, change, strict=True):
                    mine.append(self.loss_changes(own, at[e], test.targets, c))
            return [torch.stack(f) for f in found]

        parts = self._together(groups)
        for start in range(0, len(parts), workers):
            runs = [list(itertools.islice(trajectories, n)) for n in parts[start : start + workers]]
            for found in side_by_side(follow, runs, workers):
                for scores in found:
                    self.gradient_evaluations += self.ft.steps[-1] * min(
                        self.ft.protocol.batch_size, len(train)
                    )
                    yield scores

    def _together(self, groups: Mapping[int, Tensor] | None) -> list[int]:
        """Return how many seeds are followed together: an even number of parts, of equal sizes if possible.

        Seeds with other numbers of groups are kept apart.
        """
        counts = [0 if groups is None else len(groups[s]) for s in self.ft.seeds]
        found = []
        for _, same in itertools.groupby(counts):
            n = len(list(same))
            parts = min(n, 2 * -(-n // (2 * TOGETHER)))
            found += [n // parts + (k < n % parts) for k in range(parts)]
        return found

    def _kernel_plan(self, test: Instances) -> tuple[bool, int]:
        """Return whether seeds share kernels, and the number of segments."""
        p, n = self.final_model.size, len(self.train)
        outputs = self.final_model.outputs(self.train[:1])[0].numel()
        rows = min(self.max_rows, n * outputs)
        # a factored inner product costs about the layers' widths, twice sqrt(P) each; a weighted one costs P
        factored = self.ft.protocol.optimizer == "sgd" or linear_layers(self.final_model.network) is not None
        width = 4 * p**0.5 if factored else p
        one = 2.0 * rows * (rows + len(test) * outputs) * width
        runs = len(self.ft.seeds) * len(self.left_out) * self.ft.steps[-1]
        whole = 6.0 * runs * min(self.ft.protocol.batch_size, n) * p
        affordable = KERNEL_SHARE * whole / one
        share = self.kernels == "shared" or (self.kernels == "auto" and affordable < 2 * len(self.ft.seeds))
        if self.kernels == "auto":
            each = affordable if share else affordable / len(self.ft.seeds)
            return share, max(1, min(self.segments, int(each)))
        return share, self.segments

    def _knots(self, cut: Sequence[Segment]) -> list[int]:
        """Return the evaluation points at which training outputs are computed."""
        return sorted({0, *spread(self.ft.steps, KNOTS), *(s.last for s in cut)})

    def _saturates(self, model: FinalModel) -> bool:
        """Whether the loss's derivative is evaluated at the changed outputs."""
        return self.propagate == "outputs" and model.loss in SATURATING

    def _space(self, model: FinalModel, train: Instances, trajectory: Trajectory) -> OutputSpace:
        few = [trajectory.parameters[k] for k in sorted({0, *spread(self.ft.steps, 4)})]
        outputs = outputs_along(model, few, train)
        return OutputSpace.choose(model.loss, outputs, train.targets, self.left_out, self.max_rows)

    def _along(
        self,
        model: FinalModel,
        train: Instances,
        space: OutputSpace,
        trajectories: Sequence[Trajectory],
        cut: Sequence[Segment],
    ) -> Along:
        """Return the training outputs along runs."""
        knots, steps = self._knots(cut), [0, *self.ft.steps]
        constant, exact = model.loss is mean_squared_error, self._saturates(model)
        gradient, hessian, known = [], [], []
        for trajectory in trajectories:
            outputs = outputs_along(model, [trajectory.parameters[k] for k in knots], train)
            gradient.append(torch.stack([space.gradient(model.loss, f, train.targets) for f in outputs]))
            some = outputs[:1] if constant or exact else outputs
            known.append(outputs[:, space.kept])
            hessian.append(torch.stack([space.hessian(model.loss, f, train.targets) for f in some]))
        return Along(
            [steps[k] for k in knots],
            torch.stack(gradient),
            torch.stack(hessian),
            torch.stack(known) if exact else None,
        )

    def _own_kernels(
        self,
        train: Instances,
        test: Instances,
        space: OutputSpace,
        trajectories: Sequence[Trajectory],
        cut: Sequence[Segment],
    ) -> Iterator[Kernel]:
        for segment in cut:
            yield Kernel.of_seeds([self._kernel(train, test, space, [t], segment) for t in trajectories])

    def _kernel(
        self,
        train: Instances,
        test: Instances,
        space: OutputSpace,
        trajectories: Sequence[Trajectory],
        segment: Segment,
    ) -> Kernel:
        middles = [midpoint(t, segment) for t in trajectories]
        moments = [m[1] for m in middles if m[1] is not None]
        dtype = DTYPES[self.ft.protocol.dtype]
        model = moved(self.final_model.to(dtype=dtype), mean_of([m[0] for m in middles]))
        gradients = InstanceGradients(model, self.memory_mb)
        moment = mean_of(moments) if moments else None
        kernel = Kernel.at(gradients, train, test, space, self.ft.protocol, moment)
        self.gradient_evaluations += gradients.evaluations
        return kernel

    # -- along="end" and "final" ------------------------------------------------------------------------

    def _at_final_model(self, test: Instances, left_out: Instances) -> Tensor:
        weight = self._estimated_preconditioner() if self.ft.protocol.optimizer != "sgd" else None
        changes = self._relaxed(
            self.final_model, test, left_out, times(self.ft.protocol, self.ft.steps), weight
        )
        outputs = outputs_at(self.final_model, self.final_model.parameters(), test)
        found = [self.loss_changes(self.final_model, outputs, test.targets, c) for c in changes]
        return torch.stack(found).to(outputs.dtype)

    def _at_ends(self, trajectory: Trajectory, test: Instances, left_out: Instances) -> Tensor:
        """Return one seed's scores ``[E, J, L]``; evaluation points share the nearest point's Jacobians."""
        points, time = spread(self.ft.steps, self.segments), times(self.ft.protocol, self.ft.steps)
        models = {k: with_parameters(self.final_model, trajectory.parameters[k]) for k in points}
        nearest = [min(points, key=partial(_distance, e)) for e in range(1, len(time) + 1)]
        found: list[Tensor] = []
        for k in points:
            weight = None
            if trajectory.second_moment is not None:
                weight = preconditioner(self.ft.protocol, dict(trajectory.second_moment[k]))
            mine = [e for e, near in enumerate(nearest) if near == k]
            changes = self._relaxed(models[k], test, left_out, [time[e] for e in mine], weight)
            for e, change in zip(mine, changes, strict=True):
                outputs = outputs_at(self.final_model, trajectory.parameters[e + 1], test)
                found.append(self.loss_changes(self.final_model, outputs, test.targets, change))
        return torch.stack(found)

    def _relaxed(
        self,
        model: FinalModel,
        test: Instances,
        left_out: Instances,
        time: Sequence[float],
        weight: Tensor | None,
    ) -> list[Tensor]:
        """Return the changes ``[J·D, L]`` of test outputs, J_j P^½ phi(P^½ G P^½) P^½ g_i / N, per time."""
        gradients = InstanceGradients(model, self.memory_mb)
        scale = None if weight is None else weight.sqrt()
        spectrum = KernelSpectrum(model, self.train, gradients, column_scale=scale)
        pair = spectrum.pair(gradients.outputs(test), gradients.losses(left_out))
        self.gradient_evaluations += gradients.evaluations
        decay = self.ft.protocol.weight_decay if self.ft.protocol.optimizer == "sgd" else 0.0
        n = len(self.train)
        return [pair.apply(relaxation(t, decay))[..., 0].flatten(0, 1) / n for t in time]

    # -- EK-FAC's eigenbasis ----------------------------------------------------------------------------

    def _by_factors(self, test: Instances, left_out: Instances) -> Tensor:
        """Return the scores ``[E, J, L]`` by phi of EK-FAC's eigenvalues."""
        protocol, time = self.ft.protocol, times(self.ft.protocol, self.ft.steps)
        adaptive = protocol.optimizer != "sgd"
        points = [0] if self.along == "final" else spread(self.ft.steps, self.segments)
        sums: dict[int, dict[str, Tensor]] = {0: dict(self.final_model.parameters())}
        pace = dict.fromkeys(points, 1.0)
        if self.along == "final" and adaptive:
            pace[0] = _mean_step(self._estimated_preconditioner(), protocol)
        elif self.along != "final":
            count, moments = len(self.ft.seeds), dict.fromkeys(points, 0.0)
            for trajectory in self.ft.full_runs():
                for k in points:
                    part = {n: p / count for n, p in trajectory.parameters[k].items()}
                    sums[k] = {n: p + sums[k][n] for n, p in part.items()} if k in sums else part
                    if trajectory.second_moment is not None:
                        diagonal = preconditioner(protocol, dict(trajectory.second_moment[k]))
                        assert diagonal is not None
                        moments[k] += _mean_step(diagonal, protocol) / count
            pace = moments if adaptive else pace
        decay = protocol.weight_decay if not adaptive else 0.0
        nearest = [min(points, key=partial(_distance, e)) for e in range(1, len(time) + 1)]
        found: list[Tensor] = []
        for k in points:
            model = with_parameters(self.final_model, sums[k])
            gradients = InstanceGradients(model, self.memory_mb)
            factors = fit_factors(gradients, self.train)
            outputs = model.outputs(test).flatten(1)
            by_outputs = self.propagate == "outputs" and outputs.shape[1] <= MAX_EXACT_OUTPUTS
            rows = gradients.outputs(test) if by_outputs else gradients.measurements(test)
            phis = [relaxation(time[e] * pace[k], decay) for e, at in enumerate(nearest) if at == k]
            changes = kronecker_response(factors, rows, gradients.losses(left_out), phis, self.memory_mb)
            for change in changes / len(self.train):
                flat = change.flatten(0, 1)
                found.append(self.loss_changes(model, outputs, test.targets, flat) if by_outputs else flat)
            self.gradient_evaluations += gradients.evaluations
        return torch.stack(found).to(next(iter(self.final_model.parameters().values())).dtype)

    def _estimated_preconditioner(self) -> Tensor:
        """Return Adam's diagonal near the final model; a batch's squared gradient is mean^2 + var / B."""
        gradients = InstanceGradients(self.final_model, self.memory_mb)
        rows, n = gradients.losses(self.train), len(self.train)
        mean = rows.transposed_times(torch.ones(n, 1, 1, dtype=rows.dtype, device=rows.device))[:, 0] / n
        square = torch.zeros_like(mean)
        for piece in rows.pieces():
            square += piece.dense().square().sum((0, 1))
        variance = (square / n - mean.square()).clamp(min=0)
        self.gradient_evaluations += gradients.evaluations
        size = min(self.ft.protocol.batch_size, n)
        return 1 / ((mean.square() + variance / size).sqrt() + self.ft.protocol.eps)


def _mean_step(diagonal: Tensor, protocol: Protocol) -> float:
    """Return the mean of Adam's diagonal, weighted with squared gradients."""
    energy = (1 / diagonal.double() - protocol.eps).square()
    return float((energy * diagonal).sum() / energy.sum().clamp(min=1e-300))


def ignored_parts(final_model: FinalModel, protocol: Protocol) -> list[str]:
    """Return what of further training the response along the path leaves out, in words."""
    found = []
    if protocol.clip_norm is not None:
        found.append("the clipping of gradients")
    if protocol.optimizer == "adam" and protocol.weight_decay:
        found.append("Adam's L2 term")
    if any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p for m in final_model.network.modules()):
        found.append("dropout during further training")
    return found


def _distance(a: int, b: int) -> int:
    return abs(a - b)
