"""A user's checkpoint: three formats, no code executed, errors that name the layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fimo.errors import InputError
from fimo.models.adapted import Adapted
from fimo.models.checkpoint import load_checkpoint
from fimo.models.mlp import mlp


def network(width: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp(3, 2, (width,))


def save(trained: nn.Module, path: Path, form: str) -> Path:
    state = trained.state_dict()
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif form == "lightning":
        torch.save({"state_dict": {f"network.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    elif form == "wrapped":
        torch.save({"model_state_dict": {f"module.model.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("form", ["lightning", "plain", "safetensors", "wrapped"])
def test_every_format_restores_the_network(tmp_path: Path, form: str) -> None:
    trained, fresh = network(seed=1), network(seed=2)
    load_checkpoint(fresh, save(trained, tmp_path / "m.ckpt", form))
    x = torch.randn(4, 3)
    assert torch.equal(trained(x), fresh(x))


@pytest.mark.parametrize("form", ["lightning", "plain"])
def test_a_wrapped_network_takes_the_checkpoint_of_what_it_wraps(tmp_path: Path, form: str) -> None:
    trained, fresh = network(seed=1), Adapted(network(seed=2))
    load_checkpoint(fresh, save(trained, tmp_path / "m.ckpt", form))
    x = torch.randn(4, 3)
    assert torch.equal(trained(x), fresh(x))
    again = Adapted(network(seed=3))
    load_checkpoint(again, save(fresh, tmp_path / "adapted.ckpt", "plain"))  # as fimo saves it
    assert torch.equal(trained(x), again(x))


def test_another_shape_is_refused_naming_the_layer(tmp_path: Path) -> None:
    path = save(network(width=6), tmp_path / "m.ckpt", "plain")
    with pytest.raises(InputError, match=r"layer 1.weight has shape \(6, 3\) .*expects \(5, 3\)"):
        load_checkpoint(network(width=5), path)


def test_missing_extra_and_not_finite_parameters_are_named(tmp_path: Path) -> None:
    state = network().state_dict()
    path = tmp_path / "m.pt"
    torch.save({k: v for k, v in state.items() if k != "3.bias"}, path)
    with pytest.raises(InputError, match=r"lacks 3\.bias"):
        load_checkpoint(network(), path)
    torch.save({**state, "5.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"has 5\.weight"):
        load_checkpoint(network(), path)
    torch.save({**state, "3.bias": torch.tensor([0.0, float("nan")])}, path)
    with pytest.raises(InputError, match=r"layer 3\.bias .*NaN"):
        load_checkpoint(network(), path)


class Bomb:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('code was executed')",))


def test_code_in_a_checkpoint_is_never_executed(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": network().state_dict(), "callback": Bomb()}, path)
    with pytest.raises(InputError, match="code is never executed"):
        load_checkpoint(network(), path)


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("hello")
    with pytest.raises(InputError, match=r"model.checkpoint: "):
        load_checkpoint(network(), tmp_path / name)
