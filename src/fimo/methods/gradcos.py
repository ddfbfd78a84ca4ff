"""Grad-Cos."""

from __future__ import annotations

from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.gradient import GradientMethod
from fimo.scores import Scores


class GradCos(GradientMethod):
    """Cosine of the angle between the loss gradients of a test and a training instance.

    (Charpiat et al., 2019)

    score[j, i] = <g_j, g_i> / (|g_j| |g_i|); Grad-Dot with the sizes of the gradients taken out, so that
    training instances with large losses don't dominate. 0 where a gradient is exactly zero.
    """

    needs = "nothing else"
    cost = "one gradient per instance"
    use = "where gradients of odd instances would drown all others"

    def scores(self, problem: AttributionProblem) -> Scores:
        gradients = self.gradients(problem.final_model)
        left, right = gradients.measurements(problem.test), gradients.losses(problem.removed, "layers")
        norms = left.squared_norms().sqrt() * right.squared_norms().sqrt().T
        cosines = left.gram(right)[:, 0, :, 0] / norms.where(norms > 0, 1)
        return self.result(problem, cosines, gradient_evaluations=gradients.evaluations)
