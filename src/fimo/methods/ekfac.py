"""Influence with Kronecker-factored curvature: EK-FAC and K-FAC."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.curvature.jacobian import Rows
from fimo.curvature.kronecker import Fisher, KroneckerFactors, fit_factors, no_factors
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.damping import DampingValue
from fimo.methods.gradient import CurvatureMethod, FittedCurvature, Solved
from fimo.models.final_model import FinalModel

log = logging.getLogger(__name__)


class Ekfac(CurvatureMethod):
    """Influence with the EK-FAC approximation of Gauss-Newton (George et al., 2018; Grosse et al., 2023).

    score[j, i] = (1/N) g_j^T (C + damping)^-1 g_i, C block-diagonal over modules with Kronecker-factored
    eigenvectors and exact second moments along them. Test gradients are preconditioned once and for all
    dampings from the same rotation.

    Args:
        damping: ``auto``: 0.1 times each module's own mean eigenvalue (Grosse et al.); else see
            :class:`~fimo.methods.damping.Damping`, the same for all modules.
        propagate: see :class:`~fimo.methods.gradient.CurvatureMethod`.
        fisher: ``exact`` Gauss-Newton, ``sampled`` targets, ``empirical``; ``auto``: exact up to 16 outputs
            (64 under a loss of one's own, whose targets can't be drawn), else sampled.
        samples, seed: of sampled targets.
    """

    needs = "linear, convolutional or embedding layers"
    cost = "some passes over the training set"
    use = "influence functions of networks too large for `exact`: the default of the field"

    corrected: ClassVar[bool] = True

    def __init__(
        self,
        damping: DampingValue = "auto",
        propagate: Literal["loss", "outputs"] = "loss",
        fisher: Fisher = "auto",
        samples: int = 1,
        seed: int = 0,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(damping, propagate, memory_mb, storage, cache)
        if fisher not in ("auto", "exact", "sampled", "empirical"):
            raise InputError("fisher", f"expected one of auto, exact, sampled, empirical but got {fisher!r}")
        if samples < 1:
            raise InputError("samples", f"expected at least 1 but got {samples}")
        self.fisher, self.samples, self.seed = fisher, samples, seed

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        return no_factors(final_model, train, self.fisher)

    def fit(self, final_model: FinalModel, train: Instances) -> Factored:
        gradients = self.gradients(final_model)
        factors = fit_factors(gradients, train, self.corrected, self.fisher, self.samples, self.seed)
        fitted = Factored(gradients, train, factors, self.damping.kind == "auto", self.memory_mb)
        for note in fitted.notes:
            log.info("%s", note)
        return fitted


@dataclass(frozen=True)
class Factored(FittedCurvature):
    """A curvature by the Kronecker factors of its blocks.

    Args:
        factors: of all modules.
        relative: dampings are multiples of each module's own mean eigenvalue.
        memory_mb: of vectors solved for at once.
    """

    factors: KroneckerFactors
    relative: bool
    memory_mb: float

    @property
    def notes(self) -> tuple[str, ...]:
        coverage, uncovered = self.factors.coverage, self.factors.uncovered
        if not uncovered:
            return ()
        return (f"{coverage:.0%} of the parameters covered; only a diagonal for {uncovered}",)

    def mean_eigenvalue(self) -> float:
        return self.factors.mean_eigenvalue

    def solve(self, left: Rows, right: Rows, dampings: Tensor) -> Solved:
        found = []
        for piece in left.pieces(self.memory_mb / (2 + len(dampings))):
            vectors = piece.dense().flatten(0, 1).T
            solved = self.factors.solve(vectors, dampings, relative=self.relative)
            products = [right.times(s)[:, 0].T.reshape(piece.n, piece.r, right.n) for s in solved]
            found.append(torch.stack(products))
        return Solved(torch.cat(found, 1))
