"""Influence with K-FAC."""

from __future__ import annotations

from typing import ClassVar

from fimo.methods.ekfac import Ekfac


class Kfac(Ekfac):
    """Influence with K-FAC (Martens and Grosse, 2015): EK-FAC without its corrected eigenvalues.

    C = A ⊗ B for each module, A the second moment of its inputs and B of the derivatives in its outputs.
    Arguments as for :class:`~fimo.methods.ekfac.Ekfac`.
    """

    needs = "linear, convolutional or embedding layers"
    cost = "some passes over the training set"
    use = "comparisons with EK-FAC"

    corrected: ClassVar[bool] = False
