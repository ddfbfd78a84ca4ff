"""Grad-Cos."""

from __future__ import annotations

from torch import Tensor

from fimo.data.instances import Instances
from fimo.methods.gradient import GradientMethod


class GradCos(GradientMethod):
    """Cosine of the angle between the loss gradients of a test and a training instance.

    (Charpiat et al., 2019)

    score[j, i] = <g_j, g_i> / (|g_j| |g_i|); Grad-Dot with the sizes of the gradients taken out, so that
    training instances with large losses don't dominate. 0 where a gradient is exactly zero.
    """

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        left, right = self.gradients.measurements(test), self.gradients.losses(left_out)
        norms = left.squared_norms().sqrt() * right.squared_norms().sqrt().T
        return left.gram(right)[:, 0, :, 0] / norms.where(norms > 0, 1)
