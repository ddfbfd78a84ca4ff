"""Passes of networks of linear layers against autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fimo.models.activations import activation_of
from fimo.models.linear_layers import Linearised, backward, forward, linear_layers, slopes_of

ACTIVATIONS = [
    nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(0.2), nn.ELU(),
    nn.ELU(0.7),
]  # fmt: skip


@pytest.mark.parametrize("module", ACTIVATIONS, ids=repr)
def test_an_activation_s_derivatives_are_those_of_autograd(module: nn.Module) -> None:
    found = activation_of(module)
    assert found is not None
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)[:, None].requires_grad_()
    output = module(z)
    (slope,) = torch.autograd.grad(output.sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z, materialize_grads=True)
    z, slope = z.detach(), slope.detach()
    after = torch.empty_like(z)
    found.forward(z, after)
    torch.testing.assert_close(after, output.detach())
    at = after if found.from_output else z
    torch.testing.assert_close(found.slope(at), slope)
    expected = curvature if found.curvature is None else found.curvature(at)
    torch.testing.assert_close(expected, curvature)
    assert (found.curvature is None) == (not curvature.any())
    gradient = torch.full_like(z, 3.0)
    found.backward(gradient, at)
    torch.testing.assert_close(gradient, 3 * slope)


def network(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), activation, nn.Linear(5, 6, bias=False), nn.Linear(6, 3), activation
    ).double()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_passes_are_the_network_s(activation: nn.Module) -> None:
    net = network(activation)
    layers, parameters = linear_layers(net), {n: p.detach() for n, p in net.named_parameters()}
    assert layers is not None
    rows, cotangents = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    passed = forward(layers, parameters, rows)
    torch.testing.assert_close(passed.outputs, net(rows).detach())
    assert not forward(layers, parameters, rows, keep=False).entering
    stacked = {n: torch.stack([p, 2 * p]) for n, p in parameters.items()}
    both = forward(layers, stacked, rows.expand(2, -1, -1)).outputs
    torch.testing.assert_close(both[0], passed.outputs)
    twice = torch.func.functional_call(net, {n: 2 * p for n, p in parameters.items()}, (rows,))
    torch.testing.assert_close(both[1], twice.detach())
    truth = torch.autograd.grad((net(rows) * cotangents).sum(), list(net.parameters()))
    at = Linearised.at(layers, parameters, passed, cotangents)
    for name, expected in zip(parameters, truth, strict=True):
        torch.testing.assert_close(at.gradient()[name], expected)
    deltas = {k: d for k, _, d in backward(layers, parameters, slopes_of(layers, passed), cotangents)}
    assert sorted(deltas) == [0, 1, 2]
    torch.testing.assert_close(deltas[0].sum(0), truth[1])


@pytest.mark.parametrize("moving", ["all", "some"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_the_r_operator_is_the_gradient_s_derivative_along_directions(
    activation: nn.Module, moving: str
) -> None:
    net = network(activation)
    layers, parameters = linear_layers(net), {n: p.detach() for n, p in net.named_parameters()}
    assert layers is not None
    rows, weights = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    names = list(parameters) if moving == "all" else ["0.bias", "3.weight"]
    directions = {n: torch.randn(2, *parameters[n].shape, dtype=torch.float64) for n in names}

    def gradient(p: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def total(p: dict[str, torch.Tensor]) -> torch.Tensor:
            return (torch.func.functional_call(net, p, (rows,)).square() * weights).sum()

        return torch.func.grad(total)(p)

    passed = forward(layers, parameters, rows)
    at = Linearised.at(layers, parameters, passed, 2 * passed.outputs * weights)
    pushed = at.push(directions)
    # as computed from other layouts: it need not be contiguous
    cotangents = (2 * pushed.outputs * weights[:, None]).transpose(0, 1).contiguous().transpose(0, 1)
    found = at.pull(directions, pushed, cotangents)
    assert sorted(found) == sorted(names)
    for k in range(2):
        tangent = {n: directions[n][k] if n in names else torch.zeros_like(p) for n, p in parameters.items()}
        expected = torch.func.jvp(gradient, (parameters,), (tangent,))[1]
        for name in names:
            torch.testing.assert_close(found[name][k], expected[name])
    some = at[torch.tensor([2, 5])]
    assert len(some.deltas[0]) == 2
