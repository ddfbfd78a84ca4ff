"""Grad-Dot."""

from __future__ import annotations

from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.gradient import GradientMethod
from fimo.scores import Scores


class GradDot(GradientMethod):
    """Inner product of the loss gradients of a test and a training instance (Charpiat et al., 2019).

    score[j, i] = <g_j, g_i>: the change of loss_j, to first order, per unit of learning rate when a gradient
    step on instance i is taken back. It is the first-order approximation to further training in the amount of
    it (Wei et al., 2025, section 4).
    """

    needs = "nothing else"
    cost = "one gradient per instance"
    use = "a first look in seconds; right for the first steps of further training only"

    def scores(self, problem: AttributionProblem) -> Scores:
        gradients = self.gradients(problem.final_model)
        left, right = gradients.measurements(problem.test), gradients.losses(problem.removed, "layers")
        products = left.gram(right)[:, 0, :, 0]
        return self.result(problem, products, gradient_evaluations=gradients.evaluations)
