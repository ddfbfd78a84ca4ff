"""Reading a user's checkpoint without executing code from it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fimo.errors import InputError, shortened
from fimo.models.adapted import Adapted
from fimo.models.lora import LowRankAdapter
from fimo.store.files import read_tensors

KEY = "model.checkpoint"
WRITTEN = "a file that torch.save or safetensors wrote"


def load_checkpoint(network: nn.Module, path: str | Path) -> None:
    """Load a Lightning checkpoint, a plain state_dict or a safetensors file into a network, in place.

    Names may carry a prefix that all of the network's own names share in the file (``network.``,
    ``model.``, ``module.`` and so on); other entries of the file are then ignored. Names are those of what an
    :class:`~fimo.models.adapted.Adapted` wraps. Of a network with low-rank adapters the file may be of the
    network without them: fresh adapters change no output.

    Raises:
        InputError: naming ``model.checkpoint``: no such file, not a checkpoint, a missing or unexpected
            parameter, or a parameter of another shape.
    """
    path = Path(path)
    tensors = read_checkpoint(path)
    if isinstance(network, Adapted):
        network = network.network
    wanted = network.state_dict()
    before = names_without_adapters(network)
    prefix = _prefix(list(tensors), list(before.values()))
    found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if not found.keys() & (wanted.keys() - set(before.values())):  # a file without adapters
        now = {old: name for name, old in before.items()}
        fresh = {name: tensor for name, tensor in wanted.items() if name not in before}
        found = {now.get(name, name): tensor for name, tensor in found.items()} | fresh
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(KEY, f"{path} lacks {shortened(missing, 3)}; it holds {shortened(list(tensors), 6)}")
    extra = [name for name in found if name not in wanted]
    if extra:
        raise InputError(KEY, f"{path} has {shortened(extra, 3)}, which this network lacks")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise InputError(
                KEY,
                f"layer {name} has shape {tuple(found[name].shape)} in {path}, "
                f"but the configured network expects {tuple(tensor.shape)}",
            )
        if not torch.isfinite(found[name]).all():
            raise InputError(KEY, f"layer {name} in {path} holds NaN or infinite values")
    network.load_state_dict(found)


def names_without_adapters(network: nn.Module) -> dict[str, str]:
    """Return the names that a network's tensors had before it got adapters, without those of the adapters."""
    adapters = [name for name, module in network.named_modules() if isinstance(module, LowRankAdapter)]
    found = {}
    for name in network.state_dict():
        inside = [a for a in adapters if name.startswith(f"{a}.")]
        if not inside:
            found[name] = name
        elif name.startswith(f"{inside[-1]}.layer."):
            found[name] = f"{inside[-1]}.{name.removeprefix(f'{inside[-1]}.layer.')}"
    return found


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by name.

    Raises:
        InputError: no such file, or nothing that can be read without executing code.
    """
    if not path.is_file():
        problem = f"expected a file but {path} is a folder" if path.is_dir() else f"no such file: {path}"
        raise InputError(KEY, problem)
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # no pickle at all
            raise InputError(KEY, f"{path} is not a checkpoint; expected {WRITTEN}") from None
        raise InputError(
            KEY,
            f"{path} holds objects besides tensors and plain containers, and code is never executed; "
            "save network.state_dict() instead",
        ) from None
    except Exception as error:  # a damaged file fails in many ways inside torch and safetensors
        raise InputError(
            KEY, f"{path} is not a checkpoint; expected {WRITTEN} ({type(error).__name__})"
        ) from None
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise InputError(KEY, f"{path} holds no state_dict but {type(content).__name__}")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise InputError(KEY, f"{path} holds no tensors; its keys are {shortened(list(content))}")
    return tensors


def _prefix(found: list[str], wanted: list[str]) -> str:
    """Return the prefix under which the file holds most of the network's names (the shortest such)."""
    candidates = {name.removesuffix(wanted[0]) for name in found if name.endswith(wanted[0])} | {""}
    names = set(found)
    return max(sorted(candidates, key=len), key=lambda prefix: sum(prefix + name in names for name in wanted))
