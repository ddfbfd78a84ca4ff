"""Grad-Dot."""

from __future__ import annotations

from torch import Tensor

from fimo.data.instances import Instances
from fimo.methods.gradient import GradientMethod


class GradDot(GradientMethod):
    """Inner product of the loss gradients of a test and a training instance (Charpiat et al., 2019).

    score[j, i] = <g_j, g_i>: the change of loss_j, to first order, per unit of learning rate when a gradient
    step on instance i is taken back. It is the first-order approximation to further training in the amount of
    it (Wei et al., 2025, section 4).
    """

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        return self.gradients.measurements(test).gram(self.gradients.losses(left_out))[:, 0, :, 0]
