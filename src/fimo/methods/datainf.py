"""DataInf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import Rows
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.damping import Damping, DampingValue
from fimo.methods.gradient import GradientMethod
from fimo.models.final_model import FinalModel
from fimo.scores import Scores

LEAST = 1e-8
"""A layer's mean squared gradient counts as at least this share of the whole network's."""


class DataInf(GradientMethod):
    """Influence with the order of averaging and inverting exchanged, layer by layer (Kwon et al., 2024).

    The curvature of layer l is the empirical Fisher C_l = (1/N) sum_n g_n g_n^T, and (C_l + λ_l)^-1 is
    replaced by the mean of (g_n g_n^T + λ_l)^-1, which has a closed form:

        score[j, i] = (1/N) sum_l (1/λ_l) [ g_j·g_i - (1/N) sum_n (g_j·g_n)(g_n·g_i) / (λ_l + |g_n|^2) ].

    Only inner products of layer gradients are needed. A score is in units of loss change per removed
    instance, but the exchange overestimates the inverse (Jensen), so its size is not to be trusted.

    Args:
        damping: λ_l, by default 0.1 times the layer's own mean squared gradient, the authors' choice
            (``auto``); ``1x`` is one times it; a number is the same for all layers. A layer's mean squared
            gradient counts as at least 1e-8 of the whole network's: where it is zero but for rounding (the
            bias of attention's keys, which softmax cancels), 1/λ_l would make rounding errors as large as
            other layers' scores.
        layers: ``parameter``: each parameter tensor is a layer (as the authors' code has it); ``module``:
            weight and bias of a module together.
    """

    needs = "nothing else"
    cost = "one gradient per instance, layer by layer"
    use = "adapters and heads of large networks, as a cheap influence function"

    def __init__(
        self,
        damping: DampingValue = "auto",
        layers: Literal["parameter", "module"] = "parameter",
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(memory_mb, storage, cache)
        if layers not in ("parameter", "module"):
            raise InputError("layers", f"expected one of parameter, module but got {layers!r}")
        self.damping, self.grouping = Damping.parse(damping), layers

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

    def fit(self, final_model: FinalModel, train: Instances) -> LayerGradients:
        """Return what all test instances and dampings share."""
        gradients = self.gradients(final_model)
        rows = gradients.losses(train)
        groups: dict[str, list[str]] = {}
        for name in gradients.shapes:
            group = name if self.grouping == "parameter" else name.rpartition(".")[0]
            groups.setdefault(group, []).append(name)
        named = rows.parameter_norms()
        norms = {g: sum_named(named, names)[:, 0] for g, names in groups.items()}
        whole = sum(norm.double().mean().item() for norm in norms.values())
        return LayerGradients(gradients, rows, groups, norms, LEAST * whole / gradients.p)

    def scores(self, problem: AttributionProblem) -> Scores:
        layers = self.fit(problem.final_model, problem.train)
        found = self.sweep(layers, [self.damping], problem)
        return self.result(
            problem,
            found if self.follows_further_training else found[0],
            gradient_evaluations=layers.gradients.evaluations,
        )

    def sweep(
        self, layers: LayerGradients, dampings: Sequence[Damping], problem: AttributionProblem
    ) -> Tensor:
        """Return the scores ``[E, J, L]`` for E dampings, which share all inner products."""
        each = {
            group: torch.cat([layers.damping(group, d, problem.further_training) for d in dampings])
            for group in layers.groups
        }
        gradients = layers.gradients
        test_rows, removed = gradients.measurements(problem.test), gradients.losses(problem.removed)
        test_train, train_removed = test_rows.grams(layers.rows), layers.rows.grams(removed)
        test_removed = test_rows.grams(removed)
        n = len(problem.train)
        total: list[Tensor] = []
        for group, names in layers.groups.items():
            outer = sum_named(test_train, names)[:, 0, :, 0]
            inner = sum_named(train_removed, names)[:, 0, :, 0]
            direct = sum_named(test_removed, names)[:, 0, :, 0]
            for e, damping in enumerate(each[group].tolist()):
                weighted = outer / (damping + layers.norms[group])
                part = (direct - weighted @ inner / n) / damping
                if e < len(total):
                    total[e] += part
                else:
                    total.append(part)
        return torch.stack(total) / n


@dataclass(frozen=True)
class LayerGradients:
    """Training gradients by layer.

    Args:
        gradients: of the final model.
        rows: of all N training instances.
        groups: names of parameters by layer.
        norms: ``[N]`` squared norms by layer.
        least: a layer's mean squared gradient counts as at least this.
    """

    gradients: InstanceGradients
    rows: Rows
    groups: dict[str, list[str]]
    norms: dict[str, Tensor]
    least: float

    def damping(self, group: str, damping: Damping, further_training: FurtherTraining | None) -> Tensor:
        """Return a layer's dampings ``[E]``."""
        numel = sum(self.gradients.shapes[name].numel() for name in self.groups[group])
        mean_square = self.norms[group].double().mean().item() / numel
        mean_square = max(mean_square, self.least)
        # the mean eigenvalue of the empirical Fisher is the mean squared gradient
        return damping.resolve(mean_square, mean_square, further_training)


def sum_named(parts: dict[str, Tensor], names: list[str]) -> Tensor:
    """Return the sum of the named tensors."""
    return parts[names[0]] if len(names) == 1 else torch.stack([parts[n] for n in names]).sum(0)
