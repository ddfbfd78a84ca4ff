"""Representer points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.embedding import representations
from fimo.models.final_model import FinalModel

NOT_LINEAR = "the outputs are not those of a last linear layer"


class Representer(AttributionMethod):
    """Representer points of the last layer (Yeh et al., 2018).

    With an L2 penalty λ|W|^2 on the last layer, its minimum makes the outputs sum_i w_i (h_i·h), h the
    layer's input and w_i = -(1 / 2λN) dloss_i/doutputs. The score is the first-order change of the test loss
    when instance i's term is removed:

        score[j, i] = (1 / 2λN) (dloss_j/doutputs · dloss_i/doutputs) (h_j·h_i [+ 1 with a bias]).

    The final model need not be such a minimum, so only the order of scores matters; it is that of Grad-Dot
    restricted to the last layer.

    Args:
        penalty: λ; scales all scores.
        batch_size: instances per forward pass.
    """

    needs = "a last linear layer"
    cost = "one pass"
    use = "a cheap baseline of the last layer"

    def __init__(self, penalty: float = 0.01, batch_size: int = 1024) -> None:
        if penalty <= 0:
            raise InputError("penalty", f"expected a positive number but got {penalty}")
        self.penalty, self.batch_size = penalty, batch_size

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        linear = [m for m in final_model.network.modules() if isinstance(m, nn.Linear)]
        outputs = final_model.outputs(train[:1])
        if not linear or outputs.dim() != 2 or linear[-1].out_features != outputs.shape[1]:
            return NOT_LINEAR
        probe = train[:4]
        try:
            hidden = representations(final_model, probe)
        except InputError:  # the network does not use it
            return NOT_LINEAR
        with torch.no_grad():
            outputs, own = final_model.outputs(probe), linear[-1](hidden)
        return None if torch.allclose(own, outputs, 1e-3, 1e-4 * float(outputs.abs().max())) else NOT_LINEAR

    def scores(self, problem: AttributionProblem) -> Tensor:
        model, test, left_out = problem.final_model, problem.test, problem.removed
        if reason := self.inapplicable(model, problem.train):
            raise InputError("methods.representer", reason)
        layer = [m for m in model.network.modules() if isinstance(m, nn.Linear)][-1]
        ours = representations(model, test, batch_size=self.batch_size)
        theirs = representations(model, left_out, batch_size=self.batch_size)
        similarity = ours @ theirs.T + (layer.bias is not None)
        explained = (model.measurement or model.loss).gradient(model.outputs(test), test.targets)
        removed = model.loss.gradient(model.outputs(left_out), left_out.targets)
        return (explained @ removed.T) * similarity / (2 * self.penalty * len(problem.train))
