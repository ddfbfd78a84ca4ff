"""What other libraries' TRAKs share: the scalar whose gradients they project, and their scores' sign."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor
from torch.func import functional_call

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.others.foreign import ForeignMethod, Positional
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import LossFunction

MOST = 2048
"""The largest dimension that is chosen: the default of traker."""


class ProjectedMethod(ForeignMethod):
    """TRAK of the final model alone (Park et al., 2023): influence in a linear model of projected gradients.

    With f the scalar that the loss is a function of (log-odds of the correct class, a regression's output),
    q = dloss/df and φ the projected gradient of f, the library gives -φ_j^T (Φ^T Φ + damping)^-1 φ_i q_i, of
    which 1 - (probability of the correct class) is the -q_i of a classification. It is multiplied by -q_j
    here, a factor common to all i that turns the sign of f into that of the loss.

    Args:
        dimension: of the projection; when None a quarter of the training instances, at most 2,048.
        damping: added to Φ^T Φ, of gradients that the library divides by the root of their number of entries.
        seed: of the projection.
        batch_size: instances whose gradients are held at once.
    """

    def __init__(
        self, dimension: int | None = None, damping: float = 0.0, seed: int = 0, batch_size: int = 64
    ) -> None:
        for name, value in (("dimension", dimension), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise InputError(name, f"expected at least 1 but got {value}")
        if damping < 0:
            raise InputError("damping", f"expected at least 0 but got {damping}")
        self.dimension, self.damping, self.seed, self.batch_size = dimension, damping, seed, batch_size

    def unsupported(self, final_model: FinalModel, train: Instances) -> str | None:
        if self.damping or self._dimension(train) < len(train):
            return None
        return f"dimension={self.dimension} needs damping, or more than the {len(train)} training instances"

    @abstractmethod
    def kernel(self, problem: AttributionProblem, dimension: int) -> Tensor:
        """Return the library's scores ``[J, L]``, for f (or the measurement) of each test instance."""

    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        found = self.kernel(problem, self._dimension(problem.train))
        model, test = problem.final_model, problem.test
        if model.measurement is not None:
            return -found
        slope = model.loss.scalar_slope(model.outputs(test), test.targets)
        return -slope[:, None].to(found) * found

    def _dimension(self, train: Instances) -> int:
        return self.dimension or max(1, min(MOST, len(train) // 4))


def explained(final_model: FinalModel) -> LossFunction:
    """Return the scalar of a test instance: the measurement, or f."""
    return final_model.measurement or final_model.loss.scalar_output


def of_one(network: Positional, function: LossFunction) -> Callable[..., Tensor]:
    """Return a function of tensors by name (parameters, buffers), and of one instance without a batch's axis.

    Args:
        function: of outputs and targets.
    """

    def value(tensors: dict[str, Tensor], *instance: Tensor) -> Tensor:
        *inputs, target = (t[None] for t in instance)
        return function(functional_call(network, tensors, tuple(inputs)), target)[0]

    return value
