"""The response with Adam: where its preconditioner is constant, and against a recursion on parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.engine.protocol import Protocol
from fimo.linear_response.path_points import segments
from fimo.methods.response import Response
from fimo.models.losses import mean_squared_error
from tests.cases import Case, trained
from tests.methods.test_response import following, linear_regression, real_changes, scores
from tests.reference.further_training import make_optimizer

LEFT_OUT = [0, 5, 12]
FROZEN: dict[str, Any] = {"lr": 5e6, "eps": 1e8, "betas": (0.8, 0.9), "dtype": "float64"}
"""The root of the second moment is nothing beside eps: Adam steps by .05 times its first moment."""


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
@pytest.mark.parametrize("horizon", [{"epochs": 4}, {"epochs": 3, "evaluate_every": 2}])
@pytest.mark.parametrize("decay", [0.0, 4e-9])  # times the learning rate: .02
@pytest.mark.parametrize("n", [13, 14])  # of 13, shift makes epochs shorter
def test_with_a_constant_preconditioner_the_response_is_the_real_change(
    n: int, decay: float, horizon: dict[str, Any], rule: Any, pieces: int
) -> None:
    case = linear_regression(n)
    optimizer: Any = "adamw" if decay else "adam"
    protocol = Protocol(
        optimizer=optimizer, weight_decay=decay, batch_size=4, leave_out=rule,
        schedule="constant" if pieces == 1 else "linear",
        **FROZEN, **horizon,
    )  # fmt: skip
    found = scores(case, protocol, LEFT_OUT, kernels="own", segments=pieces)
    expected = real_changes(case, protocol, LEFT_OUT, [0, 1])
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


class Hidden(nn.Module):
    """A network whose Jacobians aren't factored, so that its kernel has the preconditioner itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.clone())))


def full_run(case: Case, protocol: Protocol, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each step's batch, parameters before it, and Adam's second moment after it, by torch.optim."""
    network = case.final_model.to(dtype=torch.float64).network
    trained_ = list(network.parameters())
    for p in trained_:
        p.requires_grad_()
    optimizer = make_optimizer(trained_, protocol)
    generator, found = torch.Generator().manual_seed(seed), []
    assert protocol.epochs is not None
    for _ in range(protocol.epochs):
        for index in torch.randperm(len(case.train), generator=generator).split(protocol.batch_size):
            before = torch.cat([p.detach().flatten().clone() for p in trained_])
            optimizer.zero_grad()
            batch = case.train[index]
            case.final_model.loss(network(batch.inputs), batch.targets).mean().backward()
            optimizer.step()
            moment = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in trained_])
            found.append((index, before, moment / (1 - protocol.betas[1] ** (len(found) + 1))))
    last = torch.cat([p.detach().flatten() for p in trained_])
    return [*found, (torch.empty(0), last, found[-1][2])]


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_coefficients_follow_the_linearised_run_with_the_full_run_s_preconditioner(optimizer: Any) -> None:
    """Against d and its first moment as vectors of parameters, with each segment's dense Jacobians."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(26, 3, dtype=torch.float64), torch.randn(26, 1, dtype=torch.float64)
    case = trained("tanh", Hidden().double(), mean_squared_error, inputs, targets, 22, steps=20)
    protocol = Protocol(
        optimizer=optimizer, lr=0.01, betas=(0.8, 0.9), weight_decay=0.5 if optimizer == "adamw" else 0.0,
        batch_size=8, epochs=8, leave_out="mask", dtype="float64", evaluate_every=1,
    )  # fmt: skip
    ft = following(case, protocol, [3])
    found = (
        Response(kernels="own", segments=4, removal="own")
        .attribute(case.final_model, case.train, case.test, torch.tensor([0, 5, 20]), ft)
        .values
    )
    run, (x, y) = full_run(case, protocol, 3), (case.train.inputs, case.train.targets[:, 0])
    shapes = [p.shape for p in case.final_model.parameters().values()]

    def outputs(flat: Tensor, x: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        tensors = {n: p.view(s) for n, p, s in zip(case.final_model.parameters(), parts, shapes, strict=True)}
        return torch.func.functional_call(case.final_model.network, tensors, (x,))[:, 0]

    jacobian = torch.func.jacrev(outputs)
    expected = torch.zeros_like(found)
    beta, decay = protocol.betas[0], protocol.weight_decay if optimizer == "adamw" else 0.0
    for column, i in enumerate([0, 5, 20]):
        change = moment = torch.zeros(case.final_model.size, dtype=torch.float64)
        for segment in segments(ft.steps, 4):
            middle = (segment.first + segment.last) // 2
            # the second moment of the step that leads to the segment's middle
            second = run[middle - 1][2] if middle else run[0][2]
            preconditioner = 1 / (second.sqrt() + protocol.eps)
            rows, tests = jacobian(run[middle][1], x), jacobian(run[middle][1], case.test.inputs)
            for t in range(segment.first, segment.last):
                batch = run[t][0]
                residual = outputs(run[t][1], x) - y
                pull = 2 * (rows @ change)[batch] * (batch != i) - 2 * residual[batch] * (batch == i)
                moment = beta * moment + (1 - beta) * rows[batch].T @ pull / len(batch)
                step = protocol.lr / (1 - beta ** (t + 1)) * preconditioner * moment
                change = (1 - protocol.lr * decay) * change - step
                at = outputs(run[t + 1][1], case.test.inputs) - case.test.targets[:, 0]
                expected[t, :, column] = (at + tests @ change).square() - at.square()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
