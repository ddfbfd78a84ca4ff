"""What methods built on per-instance gradients share: the gradients, their memory, the damping."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import Rows
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.base import AttributionMethod
from fimo.methods.damping import Damping, DampingValue
from fimo.models.final_model import FinalModel
from fimo.models.loss_changes import loss_changes

STORAGE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class GradientMethod(AttributionMethod):
    """A method that uses the gradients of the final model's trainable parameters.

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

    def fit(self, final_model: FinalModel, train: Instances) -> None:
        super().fit(final_model, train)
        self.gradients = self.make_gradients(final_model)

    def make_gradients(self, final_model: FinalModel) -> InstanceGradients:
        storage = STORAGE[self.storage] if self.storage else None
        return InstanceGradients(final_model, self.memory_mb, storage, self.cache)

    @property
    def gradient_evaluations(self) -> int:  # type: ignore[override]
        """Instance gradients computed so far."""
        return self.gradients.evaluations if hasattr(self, "gradients") else 0


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

    estimates_loss_change: ClassVar[bool] = True

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
        self.follows_further_training = self.damping.kind == "time_matched"
        if self.follows_further_training:
            self.without_further_training = "; damping='auto' does without"

    @property
    def follows_seeds(self) -> bool:
        """The damping depends on the amount of further training alone."""
        return False

    @abstractmethod
    def solve(self, left: Rows, right: Rows, dampings: Tensor) -> Tensor:
        """Return ``left^T (C + damping)^-1 right``  per damping, ``[E, n, R, m]``; right has one row each."""

    @abstractmethod
    def mean_eigenvalue(self) -> float:
        """Return the mean eigenvalue of C, the scale of ``auto`` damping."""

    def mean_squared_gradient(self) -> float:
        """Return the mean of the squared derivatives over training instances and parameters."""
        norms = self.gradients.losses(self.train).squared_norms()
        return norms.double().mean().item() / self.final_model.size

    def dampings(self) -> Tensor:
        """Return the configured dampings ``[E]``, E = 1 unless they follow further training."""
        kind = self.damping.kind
        ft = self.further_training
        divides = ft is not None and ft.protocol.update_rule.preconditions
        gradient = self.mean_squared_gradient() if kind == "relative" or divides else 0.0
        eigenvalue = self.mean_eigenvalue() if kind == "auto" else 0.0
        if kind == "auto" and eigenvalue <= 0 and self.mean_squared_gradient() > 0:
            raise InputError(
                "damping",
                f"auto is 0.1 times the curvature's mean eigenvalue, but that is {eigenvalue:.3g} at the "
                "final model; give a number, or a multiple of the mean squared gradient such as 10x",
            )
        return self.damping.resolve(gradient, eigenvalue, self.further_training)

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        found = self.scores_for(self.dampings(), test, left_out)
        return found if self.follows_further_training else found[0]

    def scores_for(self, dampings: Tensor, test: Instances, left_out: Instances) -> Tensor:
        """Return the scores ``[E, J, L]`` for E dampings, which share all that doesn't depend on them."""
        left = self.gradients.measurements(test) if self.propagate == "loss" else self.gradients.outputs(test)
        found = self.solve(left, self.gradients.losses(left_out), dampings) / len(self.train)
        if self.propagate == "outputs":
            model, outputs = self.final_model, self.final_model.outputs(test)
            changes = [loss_changes(model, outputs, test.targets, c.flatten(0, 1)) for c in found]
            return torch.stack(changes).to(outputs.dtype)
        return found[:, :, 0].to(self.gradients.dtype)
