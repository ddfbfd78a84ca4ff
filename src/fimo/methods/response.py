"""Response of further training to leaving an instance out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.spectrum import MAX_DIMENSION, kernel_dimension
from fimo.data.instances import Instances
from fimo.engine.leave_out import RULES, evenly, make_rule, members_of
from fimo.engine.protocol import DTYPES, Protocol
from fimo.engine.replicas import even_parts
from fimo.engine.threads import side_by_side
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining, Trajectory
from fimo.linear_response.gradient_flow import MeanBatchResponse
from fimo.linear_response.linearity import GROUPS
from fimo.linear_response.output_kernel import Kernel
from fimo.linear_response.output_space import MAX_OUTPUTS, OutputSpace
from fimo.linear_response.path_points import Segment, mean_of, midpoint, segments, spread
from fimo.linear_response.recursion import Along, moved, outputs_along, responses
from fimo.linear_response.response_cost import response_share
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.following import CHECKED_SEEDS, FollowingMethod, Tally
from fimo.models.final_model import FinalModel
from fimo.models.linear_layers import linear_layers
from fimo.models.loss_changes import loss_changes_by
from fimo.scores import Scores

log = logging.getLogger(__name__)

KNOTS = 32
"""Points of a trajectory at which training outputs are computed; linear in between."""

TOGETHER = 8
"""Most seeds that are followed together, as one batched computation on one thread."""

OUTSIDE = 8
"""Most instances that are left out of a batch at a step where all N are, in batches; and how often each is at
least until scores are wanted first."""

KERNEL_SHARE = 0.01
"""Of the gold standard's arithmetic, spent on kernels."""


class Response(FollowingMethod):
    """Predicts further training's loss changes by the linear response along it.

    score[t, j, i] = mean over seeds of loss_j(f + J_j d_t) - loss_j(f), where f are j's outputs and J_j their
    Jacobian in the seed's full run after t steps, and d_t is what leaving i out changes in the parameters, to
    first order (:mod:`fimo.linear_response.recursion`). In constant curvature G and with mean batches,
    d = phi(G) g_i / N with phi(c) = (1 - exp(-c tau)) / c, tau the sum of learning rates: between one
    gradient step (Grad-Dot, tau -> 0) and the influence function (tau -> infinity).

    An instance's loss is by default taken evenly from all batches, also where the protocol's rule drops it
    where it occurs: over seeds the mean effect is the same (:func:`fimo.engine.leave_out.evenly`), but a
    seed's holds less noise, so that few followed seeds predict other seeds' mean better.

    Args:
        along: ``path`` follows each seed's full run with its own batches, its residuals and the Jacobians of
            a few points; ``end`` takes everything at the full run's parameters at an evaluation point, with
            mean batches; ``final`` does so at the final model and runs nothing.
        propagate: ``outputs`` evaluates the loss at the changed outputs; ``loss`` takes it as linear in them.
        segments: most points at which ``path`` or ``end`` takes Jacobians.
        kernels: Jacobians of each seed's ``own`` run, or ``shared``: of the seeds' mean parameters; ``auto``
            takes as many, and own ones, as 1 % of the arithmetic of further training without each of the
            left-out instances allows.
        max_rows: most training outputs that are followed. Where there are more, but no more instances, the
            less curved directions of each are dropped; where there are more instances, a sample of half as
            many stands for all of them (:class:`fimo.linear_response.output_space.Sample`).
        memory_mb: of Jacobians held at once.
        checks: real leave-one-out runs that measure the response's error, for error bars; up to eight full
            runs come with them. At 0 bars are withheld.
        form: ``kernel`` between training outputs; ``ekfac``: phi of EK-FAC's eigenvalues instead, with mean
            batches, at the final model or (``path`` and ``end``) at the seeds' mean parameters at the nearest
            of ``segments`` points; ``auto``: the kernel unless outputs (or its eigenproblem) are too many.
        removal: ``even`` takes 1/N of a left-out instance's loss from every batch, in the response and,
            with optimizers that are linear in the gradient, in the real runs that check it (in the
            response, where an epoch has more than eight batches, from every so-manieth of them, eight times
            an epoch or more, so that it costs little for all N too); ``own`` follows the protocol's rule, and
            so the noise of the followed seeds, which is right where they are the gold standard's and it is to
            be reproduced. ``even`` is ``own`` where it has no meaning: clipped gradients, dropout,
            ``with_duplicates``, epochs that leaving out shortens.
    """

    needs = "the protocol of further training"
    cost = "one full run per seed, then about one more"
    use = "SGD up to some tens of epochs: follows the batches themselves"

    def __init__(
        self,
        along: Literal["path", "end", "final"] = "path",
        propagate: Literal["outputs", "loss"] = "outputs",
        segments: int = 6,
        kernels: Literal["auto", "own", "shared"] = "auto",
        max_rows: int = 3000,
        memory_mb: float = 1024,
        form: Literal["auto", "kernel", "ekfac"] = "auto",
        checks: int = 32,
        removal: Literal["even", "own"] = "even",
    ) -> None:
        for key, choice, allowed in (
            ("form", form, ("auto", "kernel", "ekfac")),
            ("along", along, ("path", "end", "final")),
            ("propagate", propagate, ("outputs", "loss")),
            ("kernels", kernels, ("auto", "own", "shared")),
            ("removal", removal, ("even", "own")),
        ):
            if choice not in allowed:
                raise InputError(key, f"expected one of {', '.join(allowed)} but got {choice!r}")
        for key, value in (("segments", segments), ("max_rows", max_rows), ("memory_mb", memory_mb)):
            if value < 1:
                raise InputError(key, f"expected at least 1 but got {value}")
        self.along, self.propagate, self.segments = along, propagate, segments
        self.kernels, self.max_rows, self.memory_mb = kernels, max_rows, memory_mb
        if checks < 0:
            raise InputError("checks", f"expected at least 0 but got {checks}")
        self.form, self.checks, self.removal = form, checks, removal
        self.loss_changes = loss_changes_by(propagate)

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

    def scores(self, problem: AttributionProblem) -> Scores:
        tally, further_training = Tally(), problem.followed
        reason = self.too_large(problem.final_model, problem.train) if self.form == "auto" else None
        by_factors = self.form == "ekfac" or reason is not None
        if self.along != "final":
            tally.add(len(further_training.seeds) * problem.run_gradients)
        if self.along == "path" and not by_factors:
            values, bars = self.average(self.of_real_runs(problem), self.by_seed(problem, tally), tally)
            return self.with_bars(problem, values, bars, tally)
        response = MeanBatchResponse(
            problem.final_model,
            problem.train,
            further_training,
            self.segments,
            self.propagate,
            self.memory_mb,
            make_rule(further_training.protocol, problem.train).multiplicity(problem.index),
        )
        test, removed, notes = problem.test, problem.removed, []
        if by_factors:
            notes.append(f"EK-FAC's eigenbasis instead of the kernel{f', since {reason}' if reason else ''}")
            log.info("response: %s", notes[0])
            values = response.by_factors(test, removed, at_final_model=self.along == "final")
        elif self.along == "final":
            values = response.at_final_model(test, removed)
        else:
            ends = (response.at_ends(t, test, removed) for t in further_training.full_runs())
            values, bars = self.average(self.of_real_runs(problem), ends, tally)
        if by_factors or self.along == "final":  # one score for all seeds
            seeds = len(further_training.seeds)
            checked = self.to_check(values, seeds) if seeds >= CHECKED_SEEDS else None
            predicted = [] if checked is None else [values[..., checked.instances].cpu()] * seeds
            bars = self.measured_bars(self.of_real_runs(problem), values, checked, predicted, None, tally)
        tally.add(response.gradient_evaluations)
        return self.with_bars(problem, values, bars, tally, *notes)

    def removing(self, problem: AttributionProblem) -> AttributionProblem:
        """Return the problem with the further training that is followed; see ``removal``."""
        if self.removal == "own" or problem.stochastic:
            return problem
        given = problem.followed
        return problem.along(replace(given, protocol=evenly(given.protocol, len(problem.train))))

    def takes_evenly(self, problem: AttributionProblem) -> bool:
        """Return whether instances are taken evenly from all batches, so that seeds' scores are alike."""
        return RULES[self.removing(problem).followed.protocol.leave_out].takes_evenly

    def of_real_runs(self, problem: AttributionProblem) -> AttributionProblem:
        """Return the problem with the further training of real runs.

        What isn't linear in a gradient, such as Adam's second moment, feels an instance that is wholly in a
        few batches otherwise than one that is a little in all: there it is left out where it occurs.
        """
        given = self.removing(problem).followed
        asked = problem.followed.protocol
        if given.protocol is not asked and asked.update_rule.held_fixed:
            given = replace(given, protocol=replace(asked, leave_out="mask"))
        return problem.along(given)

    def by_seed(
        self, problem: AttributionProblem, tally: Tally, of_seeds: int | None = None
    ) -> Iterator[Tensor]:
        """Yield each seed's scores ``[E, J, L]`` (float64).

        Args:
            of_seeds: how many there are, where the problem has a part of them: as many kernels are planned.
        """
        given = self.removing(problem).followed
        for ignored in ignored_parts(problem, given.protocol):
            log.warning("the response ignores %s", ignored)
        rule = make_rule(given.protocol, problem.train)
        dtype = DTYPES[given.protocol.dtype]
        model, train = problem.final_model.to(dtype=dtype), problem.train.to(dtype=dtype)
        test = problem.test.to(dtype=dtype)
        workers = torch.get_num_threads() if train.targets.device.type == "cpu" else 1
        share, most = self._kernel_plan(problem, of_seeds or len(given.seeds))
        cut = segments(given.steps, most)
        trajectories: Iterator[Trajectory] = given.full_runs()
        first = next(trajectories)
        trajectories = itertools.chain([first], trajectories)
        removed = members_of(rule, [(i,) for i in problem.index.tolist()])
        space = self._space(given.steps, model, train, first, removed)
        every = turns(len(train), given.protocol.batch_size, given.steps[0]) if self.removal == "even" else 1

        def kernel(runs: Sequence[Trajectory], segment: Segment) -> Kernel:
            return self._kernel(problem, train, test, space, runs, segment, tally)

        shared: list[Kernel] | None = None
        if share:
            kept = list(trajectories)
            trajectories = iter(kept)
            shared = side_by_side(lambda s: kernel(kept, s), cut, workers)

        def follow(runs: Sequence[Trajectory]) -> list[Tensor]:
            own = model.to()
            own_kernels = (Kernel.of_seeds([kernel([t], segment) for t in runs]) for segment in cut)
            kernels = own_kernels if shared is None else iter(shared)
            changes = responses(
                [t.seed for t in runs], problem.index, rule, given.protocol, space,
                self._along(given, own, train, space, runs, cut), cut, kernels, every,
            )  # fmt: skip
            outputs = [outputs_along(own, t.parameters[1:], test) for t in runs]
            found: list[list[Tensor]] = [[] for _ in runs]
            for e, change in enumerate(changes):
                for mine, at, c in zip(found, outputs, change, strict=True):
                    mine.append(self.loss_changes(own, at[e], test.targets, c))
            return [torch.stack(f) for f in found]

        parts = even_parts(len(given.seeds), TOGETHER)
        for start in range(0, len(parts), workers):
            runs = [list(itertools.islice(trajectories, n)) for n in parts[start : start + workers]]
            for found in side_by_side(follow, runs, workers):
                yield from found

    def expected_share(self, problem: AttributionProblem) -> float:
        """Return about what it costs as a share of the gold standard, where Jacobians have no factors.

        With the real runs for error bars, and the full runs beside them.
        """
        model, given, n = problem.final_model, problem.followed, len(problem.train)
        outputs = model.outputs(problem.test[:1])[0]
        share, most = self._kernel_plan(problem, len(given.seeds))
        cut = len(segments(given.steps, most))
        checked = self.checks + min(2 * GROUPS, len(given.seeds)) if self.checks else 0
        return checked / (len(given.seeds) * (len(problem.index) + 1)) + response_share(
            model, problem.train, given,
            left_out=len(problem.index),
            rows=min(self.max_rows, n * model.loss.rank(outputs.shape)),
            outputs=len(problem.test) * outputs.numel(),
            kernels=cut if share else cut * len(given.seeds),
            segments=cut,
            memory_mb=self.memory_mb,
        )  # fmt: skip

    def _kernel_plan(self, problem: AttributionProblem, seeds: int) -> tuple[bool, int]:
        """Return whether seeds share kernels, and the number of segments."""
        model, given, test = problem.final_model, problem.followed, problem.test
        p, n = model.size, len(problem.train)
        outputs = model.outputs(problem.train[:1])[0].numel()
        rows = min(self.max_rows, n * outputs)
        # a factored inner product costs about the layers' widths, twice sqrt(P) each; a weighted one costs P
        weighted = given.protocol.update_rule.preconditions
        factored = not weighted or linear_layers(model.network) is not None
        width = 4 * p**0.5 if factored else p
        one = 2.0 * rows * (rows + len(test) * outputs) * width
        runs = seeds * len(problem.index) * given.steps[-1]
        whole = 6.0 * runs * min(given.protocol.batch_size, n) * p
        affordable = KERNEL_SHARE * whole / one
        share = self.kernels == "shared" or (self.kernels == "auto" and affordable < 2 * seeds)
        if self.kernels == "auto":
            each = affordable if share else affordable / seeds
            return share, max(1, min(self.segments, int(each)))
        return share, self.segments

    def _saturates(self, model: FinalModel) -> bool:
        """Whether the loss's derivative is evaluated at the changed outputs."""
        return self.propagate == "outputs" and model.loss.saturates

    def _space(
        self,
        steps: Sequence[int],
        model: FinalModel,
        train: Instances,
        trajectory: Trajectory,
        removed: Tensor,
    ) -> OutputSpace:
        few = [trajectory.parameters[k] for k in sorted({0, *spread(steps, 4)})]
        outputs = outputs_along(model, few, train)
        return OutputSpace.choose(model.loss, outputs, train.targets, removed.unique(), self.max_rows)

    def _along(
        self,
        further_training: FurtherTraining,
        model: FinalModel,
        train: Instances,
        space: OutputSpace,
        trajectories: Sequence[Trajectory],
        cut: Sequence[Segment],
    ) -> Along:
        """Return the training outputs along runs."""
        steps = [0, *further_training.steps]
        # the evaluation points at which training outputs are computed
        knots = sorted({0, *spread(further_training.steps, KNOTS), *(s.last for s in cut)})
        constant, exact = model.loss.quadratic, self._saturates(model)
        gradient, hessian, known, train = [], [], [], train[space.kept]
        for trajectory in trajectories:
            outputs = outputs_along(model, [trajectory.parameters[k] for k in knots], train)
            gradient.append(torch.stack([space.gradient(model.loss, f, train.targets) for f in outputs]))
            some = outputs[:1] if constant else outputs
            if exact:
                known.append(outputs.flatten(2))
            else:
                hessian.append(torch.stack([space.hessian(model.loss, f, train.targets) for f in some]))

        def parameters(point: int) -> list[Tensor]:
            at = [t.parameters[knots[point]] for t in trajectories]
            return [torch.cat([p[name].flatten() for name in model.parameters()]) for p in at]

        return Along(
            [steps[k] for k in knots],
            torch.stack(gradient),
            torch.stack(hessian) if hessian else None,
            parameters,
            torch.stack(known) if known else None,
            model.loss,
            train.targets,
        )

    def _kernel(
        self,
        problem: AttributionProblem,
        train: Instances,
        test: Instances,
        space: OutputSpace,
        trajectories: Sequence[Trajectory],
        segment: Segment,
        tally: Tally,
    ) -> Kernel:
        protocol = problem.followed.protocol
        middles = [midpoint(t, segment) for t in trajectories]
        moments = [m[1] for m in middles if m[1] is not None]
        dtype = DTYPES[protocol.dtype]
        model = moved(problem.final_model.to(dtype=dtype), mean_of([m[0] for m in middles]))
        gradients = InstanceGradients(model, self.memory_mb)
        moment = mean_of(moments) if moments else None
        kernel = Kernel.at(gradients, train, test, space, protocol, moment)
        tally.add(gradients.evaluations)
        return kernel


def turns(instances: int, batch_size: int, first: int) -> int:
    """Return in every how manieth batch alone each left-out instance is taken, where all of them would be.

    Args:
        first: steps to the first evaluation point.
    """
    return max(1, min(-(-instances // (OUTSIDE * batch_size)), first // OUTSIDE))


def ignored_parts(problem: AttributionProblem, protocol: Protocol) -> list[str]:
    """Return what of further training the response along the path leaves out, in words."""
    found = []
    if protocol.clip_norm is not None:
        found.append("the clipping of gradients")
    if unanswered := protocol.update_rule.unanswered:
        found.append(unanswered)
    if problem.stochastic:
        found.append("dropout during further training")
    return found
