"""A method that fails where others don't, for the test of whole runs."""

from __future__ import annotations

from torch import Tensor

from fimo.curvature.solvers import DivergenceError
from fimo.data.instances import Instances
from fimo.methods.base import AttributionMethod


class Diverging(AttributionMethod):
    """Always diverges."""

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        raise DivergenceError("grew a hundredfold")
