"""Low-rank adapters: no change at first, exact when merged, and few parameters to move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fimo.errors import InputError
from fimo.models.final_model import FinalModel
from fimo.models.lora import LowRankAdapter, add_adapters, merge_adapters
from fimo.models.losses import cross_entropy


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def moved(adapted: nn.Module) -> nn.Module:
    for name, parameter in adapted.named_parameters():
        if name.endswith((".up.weight", ".down.weight")):
            nn.init.normal_(parameter)
    return adapted


def test_fresh_adapters_change_no_output() -> None:
    plain, adapted, x = network(), network(), torch.randn(4, 5).double()
    assert add_adapters(adapted, ["0", "2"], rank=2) == ["0", "2"]
    torch.testing.assert_close(adapted(x), plain(x), rtol=0, atol=0)


def test_merging_is_exact_and_leaves_the_plain_network() -> None:
    adapted, x = network(), torch.randn(4, 5).double()
    add_adapters(adapted, ["*"], rank=2, alpha=3.0)
    before = moved(adapted)(x)
    weight = adapted.get_submodule("2.layer").weight.clone()
    change = 1.5 * adapted.get_parameter("2.up.weight") @ adapted.get_parameter("2.down.weight")
    merge_adapters(adapted)
    torch.testing.assert_close(adapted(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapted.get_parameter("2.weight"), weight + change)
    assert list(adapted.state_dict()) == list(network().state_dict())
    assert not any(isinstance(m, LowRankAdapter) for m in adapted.modules())


def test_gpt2s_transposed_layers_merge_exactly_too() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from fimo.models.huggingface import causal_lm

    torch.manual_seed(0)
    adapted = causal_lm(11, width=8, heads=2, adapters={"rank": 2, "layers": ["*c_attn", "*c_proj"]})
    adapted = moved(adapted.double().eval())
    ids = torch.randint(11, (2, 5))
    before = adapted(ids)
    torch.testing.assert_close(merge_adapters(adapted)(ids), before, rtol=1e-10, atol=1e-10)


def test_only_adapters_and_what_is_not_frozen_are_trained() -> None:
    adapted = network()
    add_adapters(adapted, ["0"], rank=2, freeze="[02].*")
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == [
        "0.down.weight", "0.up.weight", "4.weight", "4.bias",
    ]  # fmt: skip
    model = FinalModel(adapted, cross_entropy, trainable=("*.up.*", "*.down.*"))
    assert model.size == 2 * (5 + 7)


def test_a_pattern_without_a_layer_and_a_bad_rank_are_refused() -> None:
    with pytest.raises(InputError, match=r"adapters: no linear layer matches '\*query'; there are 0, 2, 4"):
        add_adapters(network(), ["*query"])
    with pytest.raises(InputError, match=r"adapters: expected a rank of at least 1"):
        add_adapters(network(), ["0"], rank=0)
