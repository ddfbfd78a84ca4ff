"""The exact derivative of further training in an instance's weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.protocol import DTYPES, Protocol
from fimo.errors import InputError
from fimo.further_training.adjoint import adjoint
from fimo.further_training.tangent import tangent_outputs, tangents
from fimo.further_training.trajectory import Trajectory
from fimo.further_training.unrolled_step import FullRun
from fimo.linear_response.recursion import outputs_at
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.following import FollowingMethod, Tally
from fimo.models.final_model import FinalModel
from fimo.models.loss_changes import loss_changes_by
from fimo.scores import Scores

MAX_OUTPUTS = 2**14
"""Most outputs of an instance whose derivatives are held, for each test and left-out instance."""


class Unrolled(FollowingMethod):
    """Differentiates each seed's full run, step by step, in the weights of instances.

    score[t, j, i] = mean over seeds of loss_j(f - df/dw_i) - loss_j(f), f the outputs of test instance j
    after t steps of the full run and w_i the weight of i's loss, which leaving i out takes from 1 to 0.
    Nothing is approximated but that the outputs are linear in w_i: batches, curvature and the optimizer's
    state are the run's own (``shift`` is taken as ``mask``). Reverse mode is Engstrom et al. (2025) for
    further training. It is the reference for cheaper approximations of the derivative; where it departs from
    the gold standard, the change is too large for a derivative.

    Args:
        mode: ``forward`` carries one tangent per left-out instance, ``reverse`` one adjoint per evaluation
            point and test output, for all N instances at once; ``auto``: whichever are fewer.
        propagate: ``outputs`` evaluates the loss at the changed outputs; ``loss`` takes it as linear in them.
        seeds: at most this many of the followed ones; all when None. A tangent costs about three runs.
        chunk: tangents or adjoints carried together.
        checks: see :class:`~fimo.methods.response.Response`; with one seed bars are withheld.
    """

    needs = "the protocol of further training"
    cost = "about three full runs per test instance or left-out instance, whichever are fewer"
    use = "any network and loss, few instances: the exact derivative of each run"

    def __init__(
        self,
        mode: Literal["auto", "forward", "reverse"] = "auto",
        propagate: Literal["outputs", "loss"] = "outputs",
        seeds: int | None = 1,
        chunk: int = 32,
        checks: int = 32,
    ) -> None:
        if mode not in ("auto", "forward", "reverse"):
            raise InputError("mode", f"expected one of auto, forward, reverse but got {mode!r}")
        if propagate not in ("outputs", "loss"):
            raise InputError("propagate", f"expected one of outputs, loss but got {propagate!r}")
        if seeds is not None and seeds < 1:
            raise InputError("seeds", f"expected at least 1 or null but got {seeds}")
        if chunk < 1:
            raise InputError("chunk", f"expected at least 1 but got {chunk}")
        if checks < 0:
            raise InputError("checks", f"expected at least 0 but got {checks}")
        self.checks = checks
        self.mode, self.propagate, self.seeds, self.chunk = mode, propagate, seeds, chunk

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        outputs = final_model.outputs(train[:1])[0].numel()
        if outputs > MAX_OUTPUTS:
            return f"it differentiates at most {MAX_OUTPUTS} outputs of an instance, not {outputs}"
        step = FullRun(final_model, train[:1], Protocol(steps=1, batch_size=1, leave_out="mask"), 0, [(0,)])
        try:
            next(tangents(step, [(0,)]))
        except InputError as error:
            return error.problem
        return None

    def scores(self, problem: AttributionProblem) -> Scores:
        tally = Tally()
        seeds = len(problem.followed.seeds[: self.seeds])
        values, bars = self.average(problem, self._by_seed(problem, tally), tally, seeds)
        return self.with_bars(problem, values, bars, tally)

    def _by_seed(self, problem: AttributionProblem, tally: Tally) -> Iterator[Tensor]:
        given, left_out = problem.followed, len(problem.index)
        wide = DTYPES[given.protocol.evaluation_dtype]
        problem = replace(problem, test=problem.test.to(dtype=wide))
        model, test = problem.final_model.to(dtype=wide), problem.test
        d = model.outputs(test[:1])[0].numel()
        adjoints = len(given.steps) * len(test) * d
        forward = self.mode == "forward" or (self.mode == "auto" and left_out <= adjoints)
        to_change = loss_changes_by(self.propagate)
        runs: Iterator[Trajectory | None] = repeat(None) if forward else given.full_runs()
        for seed, trajectory in zip(given.seeds[: self.seeds], runs, strict=False):
            if trajectory is None:
                outputs, change = self._forward(problem, seed)
            else:
                outputs, change = self._reverse(problem, model, trajectory)
            tally.add(problem.run_gradients * (1 + 2 * (left_out if forward else adjoints)))
            yield torch.stack(
                [to_change(model, f, test.targets, c) for f, c in zip(outputs, change, strict=True)]
            )

    def _forward(self, problem: AttributionProblem, seed: int) -> tuple[Tensor, Tensor]:
        """Return outputs ``[E, J, ...]`` and their changes ``[E, J·D, L]``, flattened."""
        found = tangent_outputs(
            problem.final_model, problem.train, problem.test, problem.followed.protocol, seed,
            problem.index.tolist(), chunk=self.chunk, device=problem.test.targets.device,
        )  # fmt: skip
        return found.outputs, -found.derivative.flatten(3).transpose(2, 3).flatten(1, 2)

    def _reverse(
        self, problem: AttributionProblem, model: FinalModel, trajectory: Trajectory
    ) -> tuple[Tensor, Tensor]:
        """Return the same by reverse mode; ``model`` is the final model in the dtype of losses."""
        test = problem.test
        derivative = adjoint(
            problem.final_model, problem.train, test, problem.followed.protocol, trajectory.seed,
            of="outputs", chunk=self.chunk, device=test.targets.device,
        )  # fmt: skip
        wide = next(iter(model.parameters().values())).dtype
        outputs = [
            outputs_at(model, {n: p.to(wide) for n, p in at.items()}, test)
            for at in trajectory.parameters[1:]
        ]
        return torch.stack(outputs), -derivative[..., problem.index.to(derivative.device)].flatten(1, 2)
