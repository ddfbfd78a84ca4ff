"""TracIn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.gradient import GradientMethod
from fimo.models.checkpoint import load_checkpoint
from fimo.models.copied import duplicate
from fimo.models.final_model import FinalModel
from fimo.scores import Access, Scores


class TracIn(GradientMethod):
    """Inner products of loss gradients, summed over checkpoints of training (Pruthi et al., 2020, TracInCP).

    score[j, i] = sum_c lr_c <g_j(θ_c), g_i(θ_c)>. Where only the final model is known the sum has one term
    (access FiMO), which is Grad-Dot up to the learning rate.

    Args:
        checkpoints: files (Lightning, plain state_dict, safetensors) or state_dicts; the final model alone
            when None.
        lr: the learning rate at each checkpoint, or one for all.
        normalise: divide each gradient by its norm (the variant of later work; Grad-Cos for one checkpoint).
    """

    needs = "checkpoints of training (without them: Grad-Dot)"
    cost = "one gradient per instance and checkpoint"
    use = "where checkpoints of the training itself were kept"

    def __init__(
        self,
        checkpoints: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
        lr: float | Sequence[float] = 1.0,
        normalise: bool = False,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(memory_mb, storage, cache)
        self.checkpoints = None if checkpoints is None else list(checkpoints)
        self.rates = rates_of(self.checkpoints, lr)
        self.normalise = normalise

    @property
    def access(self) -> Access:
        return Access.FINAL_MODEL if self.checkpoints is None else Access.CHECKPOINTS

    def scores(self, problem: AttributionProblem) -> Scores:
        total, evaluations = torch.zeros(()), 0
        for model, rate in zip(models_at(problem.final_model, self.checkpoints), self.rates, strict=True):
            gradients = self.gradients(model)
            left, right = gradients.measurements(problem.test), gradients.losses(problem.removed, "layers")
            products = left.gram(right)[:, 0, :, 0]
            if self.normalise:
                norms = left.squared_norms().sqrt() * right.squared_norms().sqrt().T
                products = products / norms.where(norms > 0, 1)
            total = rate * products + (total if total.dim() else 0)
            evaluations += gradients.evaluations
        return self.result(problem, total, gradient_evaluations=evaluations)


def rates_of(checkpoints: Sequence[object] | None, lr: float | Sequence[float]) -> list[float]:
    """Return the learning rate at each checkpoint; at the final model alone when ``checkpoints`` is None.

    Raises:
        InputError: there is no checkpoint, another number of rates, or one that is not positive.
    """
    count = 1 if checkpoints is None else len(checkpoints)
    if count == 0:
        raise InputError("checkpoints", "expected at least one but got none")
    rates = [float(x) for x in lr] if isinstance(lr, Sized) else [float(lr)] * count
    if len(rates) != count:
        raise InputError("lr", f"expected one learning rate per checkpoint but got {len(rates)} for {count}")
    if not all(0 < rate < math.inf for rate in rates):
        raise InputError("lr", f"expected positive learning rates but got {rates}")
    return rates


def models_at(
    final_model: FinalModel, checkpoints: Sequence[str | Path | Mapping[str, Tensor]] | None
) -> list[FinalModel]:
    """Return the model at each checkpoint; the final model alone when None."""
    return [final_model] if checkpoints is None else [at_checkpoint(final_model, c) for c in checkpoints]


def at_checkpoint(final_model: FinalModel, checkpoint: str | Path | Mapping[str, Tensor]) -> FinalModel:
    """Return the same model at another checkpoint: a file, or a state_dict with the network's own names.

    Raises:
        InputError: the file can't be read, or names or shapes don't fit the network.
    """
    network = duplicate(final_model.network)
    try:
        if isinstance(checkpoint, Mapping):
            network.load_state_dict(dict(checkpoint))
        else:
            load_checkpoint(network, checkpoint)
    except InputError as error:
        raise InputError("checkpoints", error.problem) from error
    except RuntimeError as error:
        raise InputError("checkpoints", str(error).splitlines()[-1].strip()) from error
    return FinalModel(network, final_model.loss, final_model.measurement, final_model.trainable)
