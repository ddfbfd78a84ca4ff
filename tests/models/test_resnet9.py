"""ResNet-9: its size, and per-instance gradients with frozen batch statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fimo.errors import InputError
from fimo.models.resnet9 import resnet9


def test_it_has_the_usual_number_of_parameters() -> None:
    assert sum(p.numel() for p in resnet9(10).parameters()) == 6_573_130


def test_in_eval_mode_instances_do_not_see_one_another() -> None:
    torch.manual_seed(0)
    network, x = resnet9(3, width=2).double(), torch.randn(4, 3, 16, 16).double()
    network(x)  # batch statistics away from zero and one
    network.eval()
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]), rtol=1e-10, atol=1e-12)
    parameters = {n: p.detach() for n, p in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, {**buffers, **parameters}, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        expected = grad(loss)(parameters, x[i])
        for name, value in expected.items():
            torch.testing.assert_close(found[name][i], value, rtol=1e-8, atol=1e-10)


def test_greys_and_sizes() -> None:
    assert resnet9(4, channels=1, width=2)(torch.randn(2, 1, 28, 28)).shape == (2, 4)
    with pytest.raises(InputError, match=r"model\.network\.width"):
        resnet9(4, width=0)
