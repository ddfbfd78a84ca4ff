"""The Hessian of the mean training loss, by the fastest products that a network allows."""

from __future__ import annotations

from collections.abc import Callable

from fimo.curvature.linear_products import LinearHessian
from fimo.curvature.operators import Hessian
from fimo.curvature.piecewise import PiecewiseLinearHessian, is_shallow
from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel
from fimo.models.linear_layers import layers_on


def hessian(
    final_model: FinalModel, instances: Instances, count: Callable[[int], None] | None = None
) -> LinearHessian | Hessian:
    """Return the Hessian of the mean training loss.

    Written out where the network is one of linear layers, and with what is left of Gauss-Newton summed over
    the instances once where it is shallow and narrow enough; else by automatic differentiation.

    Args:
        final_model: at whose parameters.
        instances: over which the loss is averaged.
        count: called with the number of products of one instance and one vector, as they are made.
    """
    if layers_on(final_model, instances) is not None:
        kind = PiecewiseLinearHessian if is_shallow(final_model, instances) else LinearHessian
        return kind(final_model, instances, count)
    return Hessian(final_model, instances, count=count)
