"""Influence with Kronecker-factored curvature: EK-FAC and K-FAC."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.curvature.cotangents import Cotangents, GradientOf
from fimo.curvature.gradients import Form
from fimo.curvature.jacobian import Rows
from fimo.curvature.kronecker import Fisher, KroneckerFactors, chosen_fisher, fit_factors, no_factors
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.damping import DampingValue
from fimo.methods.gradient import Solved
from fimo.methods.rescaled import RescalableCurvature, RescalableInfluence
from fimo.models.final_model import FinalModel
from fimo.models.losses import Loss

log = logging.getLogger(__name__)


class Ekfac(RescalableInfluence):
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
        rescaled: take the left-out instance's own curvature away with it, see
            :class:`~fimo.methods.rescaled.RescalableInfluence`. It is refused where EK-FAC spreads the
            curvature so that there is less of it along an instance's gradient than the instance's own, as it
            does wherever parameters outnumber instances.
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
        rescaled: bool = False,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(damping, propagate, rescaled, memory_mb, storage, cache)
        if fisher not in ("auto", "exact", "sampled", "empirical"):
            raise InputError("fisher", f"expected one of auto, exact, sampled, empirical but got {fisher!r}")
        if samples < 1:
            raise InputError("samples", f"expected at least 1 but got {samples}")
        self.fisher, self.samples, self.seed = fisher, samples, seed

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        if self.rescaled and chosen_fisher(final_model, train, self.fisher) == "sampled":
            return (
                "rescaled=true needs the curvature of each instance, not samples (fisher=exact or empirical)"
            )
        return no_factors(final_model, train, self.fisher)

    def fit(self, final_model: FinalModel, train: Instances) -> Factored:
        if self.rescaled and (reason := self.inapplicable(final_model, train)):
            raise InputError("rescaled", reason)
        gradients = self.gradients(final_model)
        factors = fit_factors(gradients, train, self.corrected, self.fisher, self.samples, self.seed)
        empirical = self.fisher == "empirical"
        fitted = Factored(gradients, train, factors, self.damping.kind == "auto", self.memory_mb, empirical)
        for note in fitted.notes:
            log.info("%s", note)
        return fitted


@dataclass(frozen=True)
class Factored(RescalableCurvature):
    """A curvature by the Kronecker factors of its blocks.

    Args:
        factors: of all modules.
        relative: dampings are multiples of each module's own mean eigenvalue.
        memory_mb: of vectors solved for at once.
        empirical: whether it is the empirical Fisher, else Gauss-Newton.
    """

    form: ClassVar[Form] = "calls"

    factors: KroneckerFactors
    relative: bool
    memory_mb: float
    empirical: bool

    @property
    def notes(self) -> tuple[str, ...]:
        coverage, uncovered = self.factors.coverage, self.factors.uncovered
        if not uncovered:
            return ()
        return (f"{coverage:.0%} of the parameters covered; only a diagonal for {uncovered}",)

    def mean_eigenvalue(self) -> float:
        return self.factors.mean_eigenvalue

    def root(self, loss: Loss) -> Cotangents:
        return GradientOf(loss) if self.empirical else loss.hessian_root

    def own(self, rows: Rows, dampings: Tensor) -> Tensor:
        found = []
        for piece in rows.pieces(self.memory_mb / (2 + len(dampings))):
            vectors = piece.dense()
            solved = self._solved(vectors, dampings)
            found.append(torch.stack([vectors @ s.T.view_as(vectors).mT for s in solved]))
        return torch.cat(found, 1)

    def combined(self, left: Rows, right: Rows, weights: Tensor, dampings: Tensor) -> Solved:
        found = []
        for piece in left.pieces(self.memory_mb / (2 + len(dampings))):
            solved = self.factors.solve_rows(piece, dampings, self.relative)  # [E, P, n R]
            e, _, k = solved.shape
            # one pass over the rows on the right for all dampings
            products = right.times(solved[0] if e == 1 else torch.cat(list(solved), 1))
            summed = (products.unflatten(2, (e, k)) * weights.permute(1, 2, 0)[..., None]).sum(1)
            found.append(summed.permute(1, 2, 0).reshape(e, piece.n, piece.r, right.n))
        return Solved(torch.cat(found, 1))

    def _solved(self, vectors: Tensor, dampings: Tensor) -> Tensor:
        """Return ``(C + damping)^-1`` of vectors ``[n, R, P]``, as ``[E, P, n R]``."""
        return self.factors.solve(vectors.flatten(0, 1).T, dampings, relative=self.relative)
