"""Methods and a way to judge them that fail where others don't, for the test of whole runs."""

from __future__ import annotations

import pandas as pd
from torch import Tensor

from fimo.curvature.solvers import DivergenceError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.tasks.base import Judged, Task


class Diverging(AttributionMethod):
    """Always diverges."""

    def scores(self, problem: AttributionProblem) -> Tensor:
        raise DivergenceError("grew a hundredfold")


class Mistaken(AttributionMethod):
    """Fails as foreign code does, over several lines."""

    def scores(self, problem: AttributionProblem) -> Tensor:
        raise IndexError("Dimension out of range\n(in some library)")


class Unwritable(AttributionMethod):
    """Meets a full disk."""

    def scores(self, problem: AttributionProblem) -> Tensor:
        raise OSError(28, "No space left on device", "somewhere")


class MistakenTask(Task):
    """A way to judge methods that raises an error of its own."""

    def __call__(self, run: Judged) -> pd.DataFrame:
        raise KeyError("no such column")
