"""DataInf."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.damping import Damping, DampingValue
from fimo.methods.gradient import GradientMethod
from fimo.models.final_model import FinalModel

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

    estimates_loss_change: ClassVar[bool] = True

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
        self.follows_further_training = self.damping.kind == "time_matched"
        if self.follows_further_training:
            self.without_further_training = "; damping='auto' does without"

    @property
    def follows_seeds(self) -> bool:
        """The damping depends on the amount of further training alone."""
        return False

    def fit(self, final_model: FinalModel, train: Instances) -> None:
        super().fit(final_model, train)
        self.rows = self.gradients.losses(train)
        self.groups: dict[str, list[str]] = {}
        for name in self.gradients.shapes:
            group = name if self.grouping == "parameter" else name.rpartition(".")[0]
            self.groups.setdefault(group, []).append(name)
        norms = self.rows.parameter_norms()
        self.norms = {g: sum_named(norms, names)[:, 0] for g, names in self.groups.items()}
        whole = sum(norm.double().mean().item() for norm in self.norms.values())
        self.least = LEAST * whole / self.gradients.p

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        dampings = {g: self._dampings(g) for g in self.groups}
        found = self._scores(dampings, test, left_out)
        return found if self.follows_further_training else found[0]

    def scores_for(self, dampings: list[DampingValue], test: Instances, left_out: Instances) -> Tensor:
        """Return the scores ``[E, J, L]`` for E dampings, which share all inner products."""
        parsed = [Damping.parse(d) for d in dampings]
        each = {g: torch.cat([self._dampings(g, d) for d in parsed]) for g in self.groups}
        return self._scores(each, test, left_out)

    def _dampings(self, group: str, damping: Damping | None = None) -> Tensor:
        damping = damping or self.damping
        numel = sum(self.gradients.shapes[name].numel() for name in self.groups[group])
        mean_square = self.norms[group].double().mean().item() / numel
        mean_square = max(mean_square, self.least)
        # the mean eigenvalue of the empirical Fisher is the mean squared gradient
        return damping.resolve(mean_square, mean_square, self.further_training)

    def _scores(self, dampings: dict[str, Tensor], test: Instances, left_out: Instances) -> Tensor:
        test_rows, removed = self.gradients.measurements(test), self.gradients.losses(left_out)
        test_train, train_removed = test_rows.grams(self.rows), self.rows.grams(removed)
        test_removed = test_rows.grams(removed)
        total: list[Tensor] = []
        for group, names in self.groups.items():
            outer = sum_named(test_train, names)[:, 0, :, 0]
            inner = sum_named(train_removed, names)[:, 0, :, 0]
            direct = sum_named(test_removed, names)[:, 0, :, 0]
            for e, damping in enumerate(dampings[group].tolist()):
                weighted = outer / (damping + self.norms[group])
                part = (direct - weighted @ inner / len(self.train)) / damping
                if e < len(total):
                    total[e] += part
                else:
                    total.append(part)
        return torch.stack(total) / len(self.train)


def sum_named(parts: dict[str, Tensor], names: list[str]) -> Tensor:
    """Return the sum of the named tensors."""
    return parts[names[0]] if len(names) == 1 else torch.stack([parts[n] for n in names]).sum(0)
