"""Low-rank adapters: no change at first, exact when merged, and few parameters to move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica
from fimo.errors import InputError
from fimo.models.checkpoint import load_checkpoint
from fimo.models.final_model import FinalModel
from fimo.models.lora import LowRankAdapter, add_adapters
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


def test_an_adapter_adds_its_scaled_low_rank_change_to_the_weight() -> None:
    adapted, x = network(), torch.randn(4, 5).double()
    add_adapters(adapted, ["2"], rank=2, alpha=3.0)
    found = moved(adapted)(x)
    plain = network()
    change = 1.5 * adapted.get_parameter("2.up.weight") @ adapted.get_parameter("2.down.weight")
    plain.get_parameter("2.weight").data += change.detach()
    torch.testing.assert_close(found, plain(x), rtol=1e-12, atol=1e-12)


def test_an_adapter_of_gpt2s_transposed_layers_does_too() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(6, 4).double()  # [in, out] = [4, 6]
    adapted, x = moved(LowRankAdapter(layer, rank=2, alpha=3.0).double()), torch.randn(5, 4).double()
    weight = layer.weight.T + 1.5 * adapted.get_parameter("up.weight") @ adapted.get_parameter("down.weight")
    torch.testing.assert_close(adapted(x), x @ weight.T + layer.bias, rtol=1e-12, atol=1e-12)


class Shapes(TorchDispatchMode):
    """Notes the shapes that products multiply, and those of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[torch.Size, torch.Size, torch.Size]] = []
        self.results: set[torch.Size] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.products.append((args[-2].shape, args[-1].shape, found.shape))
        self.results |= {t.shape for t in tree_leaves(found) if isinstance(t, Tensor)}
        return found


@pytest.mark.parametrize("together", [True, False])
def test_frozen_weights_are_one_product_for_all_replicas_and_have_no_gradient(together: bool) -> None:
    adapted = network().float()
    add_adapters(adapted, ["0", "2"], rank=2)
    data = Instances(torch.randn(20, 5), torch.randint(3, (20,)))
    model = FinalModel(moved(adapted), cross_entropy, trainable=("*.up.*", "*.down.*"))
    protocol = Protocol(batch_size=10, steps=9, leave_out="mask")
    setting = Setting.build(model, data, data[:2], protocol)
    assert setting.engine == "functional"
    chunk = Chunk(
        setting if together else replace(setting, engine="loop"), [Replica(0, (k,)) for k in range(4)]
    )
    chunk.advance(1)
    with Shapes() as seen:
        chunk.advance(2)
    rows = 40 if together else 10
    times = 1 if together else 4
    second = [left for left, right, _ in seen.products if right == (7, 6)]  # forwards
    assert second == [(rows, 7)] * times
    first = [left for left, right, _ in seen.products if right == (5, 7)]  # of inputs that replicas share
    assert first == [(10, 5)] * times
    weights = {(7, 5), (5, 7), (6, 7), (7, 6)}
    assert not weights & {tuple(result[-2:]) for _, _, result in seen.products}  # no gradient of them
    assert not {(4, *shape) for shape in weights} & seen.results  # no copies


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


def test_a_checkpoint_from_before_the_adapters_is_read_and_another_one_refused(tmp_path: Path) -> None:
    plain, adapted, x = network(), network(), torch.randn(4, 5).double()
    nn.init.normal_(plain.get_parameter("2.weight"))
    torch.save({"state_dict": {f"net.{k}": v for k, v in plain.state_dict().items()}}, tmp_path / "plain.pt")
    add_adapters(adapted, ["0", "2"], rank=2)
    load_checkpoint(adapted, tmp_path / "plain.pt")
    torch.testing.assert_close(adapted(x), plain(x), rtol=0, atol=0)
    torch.save(moved(adapted).state_dict(), tmp_path / "adapted.pt")
    again = network()
    add_adapters(again, ["0", "2"], rank=2)
    load_checkpoint(again, tmp_path / "adapted.pt")
    torch.testing.assert_close(again(x), adapted(x), rtol=0, atol=0)
    state = plain.state_dict()
    state.pop("2.bias")
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(InputError, match=r"lacks .*2\.layer\.bias"):
        load_checkpoint(again, tmp_path / "less.pt")
    torch.save(plain.state_dict() | {"9.bias": torch.ones(1)}, tmp_path / "more.pt")
    with pytest.raises(InputError, match=r"has 9\.bias, which this network lacks"):
        load_checkpoint(again, tmp_path / "more.pt")
