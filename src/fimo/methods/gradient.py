"""What methods built on per-instance gradients share: the gradients, their memory, the damping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import Form, InstanceGradients
from fimo.curvature.jacobian import Rows
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.damping import Damping, DampingValue
from fimo.models.final_model import FinalModel
from fimo.models.loss_changes import loss_changes
from fimo.scores import Scores

STORAGE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class GradientMethod(AttributionMethod):
    """A method that uses the gradients of the final model's trainable parameters.

    Those at the final model are shared with the other methods of a run, as far as ``memory_mb`` holds them.

    Args:
        memory_mb: of gradients held at once; more are computed in blocks.
        storage: dtype of gradients that are kept (``bfloat16`` halves their memory); the model's when None.
        cache: a folder for gradients that don't fit into memory; computed again when None.
    """

    def __init__(self, memory_mb: float = 1024, storage: str | None = None, cache: str | None = None) -> None:
        if memory_mb <= 0:
            raise InputError("memory_mb", f"expected a positive number but got {memory_mb}")
        if storage is not None and storage not in STORAGE:
            raise InputError("storage", f"expected one of {', '.join(STORAGE)} or null but got {storage!r}")
        self.memory_mb, self.storage, self.cache = memory_mb, storage, cache

    def gradients(self, final_model: FinalModel) -> InstanceGradients:
        """Return a final model's per-instance gradients, which count their evaluations."""
        storage = STORAGE[self.storage] if self.storage else None
        return InstanceGradients(final_model, self.memory_mb, storage, self.cache)


@dataclass(frozen=True)
class Solved:
    """Products with an inverse curvature.

    Args:
        values: ``left^T (C + damping)^-1 right`` per damping, ``[E, n, R, m]``.
        residuals: of an iterative solution, the largest relative one for each damping and block of rows.
        iterations: that each of them took.
    """

    values: Tensor
    residuals: tuple[float, ...] = ()
    iterations: tuple[int, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """How far an iterative solution has converged, in words."""
        if not self.residuals:
            return ()
        worst, most = max(self.residuals), max(self.iterations)
        return (f"solved in at most {most} steps to a relative residual of {worst:.2g}",)


@dataclass(frozen=True)
class FittedCurvature(ABC):
    """A curvature matrix C of the mean training loss at one final model, ready to be inverted.

    It depends on the training set alone: test instances, left-out instances and dampings share it.

    Args:
        gradients: of the final model.
        train: all N training instances.
    """

    form: ClassVar[Form] = "dense"
    """In which it takes test instances' rows."""

    gradients: InstanceGradients
    train: Instances

    @property
    def final_model(self) -> FinalModel:
        return self.gradients.final_model

    @abstractmethod
    def solve(self, left: Rows, right: Rows, dampings: Tensor) -> Solved:
        """Return ``left^T (C + damping)^-1 right`` per damping; right has one row each."""

    @abstractmethod
    def mean_eigenvalue(self) -> float:
        """Return the mean eigenvalue of C, the scale of ``auto`` damping."""

    def mean_squared_gradient(self) -> float:
        """Return the mean of the squared derivatives over training instances and parameters."""
        norms = self.gradients.losses(self.train, "layers").squared_norms()
        return norms.double().mean().item() / self.final_model.size

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of how C was taken."""
        return ()


class CurvatureMethod(GradientMethod):
    """An influence function: loss gradients of test and training instances through an inverse curvature.

    score[j, i] = (1/N) g_j^T (C + damping I)^-1 g_i, with g_j the gradient of test instance j's loss (or
    measurement), g_i that of training instance i's loss, and C a curvature matrix of the mean training loss:
    the first-order change of j's loss when i leaves the training set and the parameters move to the damped
    quadratic objective's new minimum (Koh and Liang, 2017). Relative to further training (Wei et al., 2025,
    section 4) it is the limit of infinitely many steps of the linearised dynamics; ``time_matched`` damping
    stands in for finitely many.

    Args:
        damping: see :class:`~fimo.methods.damping.Damping`; ``time_matched``, which needs further training
            to match, is the default of ``exact``, ``cg`` and ``lissa``, and ``auto`` that of the others.
        propagate: ``loss`` takes the loss as linear in the parameter change; ``outputs`` takes the outputs as
            linear and evaluates the loss at the changed outputs, which keeps its curvature.
    """

    def __init__(
        self,
        damping: DampingValue = "auto",
        propagate: Literal["loss", "outputs"] = "loss",
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(memory_mb, storage, cache)
        if propagate not in ("loss", "outputs"):
            raise InputError("propagate", f"expected one of loss, outputs but got {propagate!r}")
        self.damping, self.propagate = Damping.parse(damping), propagate

    @property
    def predicts_loss_change(self) -> bool:
        return True

    @property
    def follows_further_training(self) -> bool:
        return self.damping.kind == "time_matched"

    @property
    def follows_seeds(self) -> bool:
        """The damping depends on the amount of further training alone."""
        return False

    @property
    def without_further_training(self) -> str:
        return "; damping='auto' does without"

    @abstractmethod
    def fit(self, final_model: FinalModel, train: Instances) -> FittedCurvature:
        """Return the curvature of the mean training loss, ready to be inverted for any test instances."""

    def dampings(self, curvature: FittedCurvature, further_training: FurtherTraining | None) -> Tensor:
        """Return the configured dampings ``[E]``, E = 1 unless they follow further training."""
        kind = self.damping.kind
        divides = further_training is not None and further_training.protocol.update_rule.preconditions
        gradient = curvature.mean_squared_gradient() if kind == "relative" or divides else 0.0
        eigenvalue = curvature.mean_eigenvalue() if kind == "auto" else 0.0
        if kind == "auto" and eigenvalue <= 0 and curvature.mean_squared_gradient() > 0:
            raise InputError(
                "damping",
                f"auto is 0.1 times the curvature's mean eigenvalue, but that is {eigenvalue:.3g} at the "
                "final model; give a number, or a multiple of the mean squared gradient such as 10x",
            )
        return self.damping.resolve(gradient, eigenvalue, further_training)

    def scores(self, problem: AttributionProblem) -> Scores:
        return self.scores_by(self.fit(problem.final_model, problem.train), problem)

    def scores_by(self, curvature: FittedCurvature, problem: AttributionProblem) -> Scores:
        """Return scores by what :meth:`fit` returned for the same final model and training set.

        The evaluations counted are all that were made with it so far.
        """
        dampings = self.dampings(curvature, problem.further_training)
        values, notes = self.sweep(curvature, dampings, problem)
        return self.result(
            problem,
            values if self.follows_further_training else values[0],
            gradient_evaluations=curvature.gradients.evaluations,
            notes=(*curvature.notes, *notes),
        )

    def sweep(
        self, curvature: FittedCurvature, dampings: Tensor, problem: AttributionProblem
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Return the scores ``[E, J, L]`` for E dampings, which share all that doesn't depend on them.

        Also what a reader must know of them.
        """
        gradients = curvature.gradients
        by_loss = self.propagate == "loss"
        rows = gradients.measurements if by_loss else gradients.outputs
        left = rows(problem.test, curvature.form)
        solved = self.solved(curvature, left, problem, dampings)
        found = solved.values / len(problem.train)
        if not by_loss:
            model, test = problem.final_model, problem.test
            outputs = model.outputs(test)
            changes = [loss_changes(model, outputs, test.targets, c.flatten(0, 1)) for c in found]
            return torch.stack(changes).to(outputs.dtype), solved.notes
        return found[:, :, 0].to(gradients.dtype), solved.notes

    def solved(
        self, curvature: FittedCurvature, left: Rows, problem: AttributionProblem, dampings: Tensor
    ) -> Solved:
        """Return ``left^T (C + damping)^-1 g_i`` of the left-out instances' gradients."""
        return curvature.solve(left, curvature.gradients.losses(problem.removed, "layers"), dampings)
