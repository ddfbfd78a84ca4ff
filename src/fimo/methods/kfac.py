"""Influence with K-FAC."""

from __future__ import annotations

from typing import ClassVar

from fimo.methods.ekfac import Ekfac


class Kfac(Ekfac):
    """Influence with K-FAC (Martens and Grosse, 2015): EK-FAC without its corrected eigenvalues.

    C = A ⊗ B for each module, A the second moment of its inputs and B of the derivatives in its outputs.
    Arguments as for :class:`~fimo.methods.ekfac.Ekfac`.
    """

    corrected: ClassVar[bool] = False
