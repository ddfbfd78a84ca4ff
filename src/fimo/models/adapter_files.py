"""Low-rank adapters in the layout of Hugging Face's PEFT: a folder of two files.

``adapter_config.json`` says rank, scale and layers, and ``adapter_model.safetensors`` holds for each layer M
``base_model.model.M.lora_A.weight`` [r, in] and ``base_model.model.M.lora_B.weight`` [out, r], by the names
of the model that PEFT wrapped; the layer becomes x -> W x + b + s B A x with s = lora_alpha / r, or
lora_alpha / sqrt(r) where ``use_rslora``. Modules that were trained whole (``modules_to_save``, such as a
classification head) are there under their own names. What else PEFT can do is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fimo.errors import InputError, shortened
from fimo.models.lora import KEY, LowRankAdapter, is_linear
from fimo.store.files import read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"

HANDLED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
}
HARMLESS = {
    # the file's tensors say which layers have adapters, and their shapes which way round a weight lies
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    # of how adapters began, how they run, or of the file itself
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "init_lora_weights", "runtime_config", "eva_config", "loftq_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "megatron_config", "megatron_core", "ensure_weight_tying",
}  # fmt: skip
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take something off the base model's weights, which a file of adapters does not hold."""


@dataclass(frozen=True)
class AdapterFiles:
    """A folder's adapters.

    Args:
        folder: where they were read.
        config: of ``adapter_config.json``.
        down, up: A and B by the layers' names in the model that PEFT wrapped.
        whole: tensors of modules that were trained whole, by their names there.
    """

    folder: Path
    config: Mapping[str, Any]
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: str | Path) -> AdapterFiles:
        """Read a folder.

        Raises:
            InputError: naming ``model.network.adapters``: no such folder or files, another kind of adapter,
                or a setting that fimo does not have.
        """
        folder = Path(folder).expanduser()
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(
                    KEY, f"expected a folder with {CONFIG} and {WEIGHTS} but {folder} has no {name}"
                )
        try:
            config = json.loads((folder / CONFIG).read_text())
            tensors = read_tensors(folder / WEIGHTS)
        except Exception as error:  # a damaged file fails in its reader's own ways
            raise InputError(KEY, f"{folder} can't be read ({type(error).__name__}: {error})") from None
        if not isinstance(config, dict):
            raise InputError(KEY, f"{folder / CONFIG}: expected settings by name")
        _refuse_others(config, folder)
        named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        down = {n.removesuffix(A): t for n, t in named.items() if n.endswith(A)}
        up = {n.removesuffix(B): t for n, t in named.items() if n.endswith(B)}
        whole = {n: t for n, t in named.items() if not n.endswith((A, B))}
        if not down or down.keys() != up.keys():
            odd = sorted(down.keys() ^ up.keys())
            raise InputError(
                KEY, f"{folder}: expected lora_A and lora_B of each layer but {shortened(odd) or 'none'}"
            )
        saved = config.get("modules_to_save") or []
        extra = [n for n in whole if not any(re.search(rf"(^|\.){re.escape(m)}\.", n) for m in saved)]
        if extra:
            raise InputError(
                KEY, f"{folder}: {shortened(extra, 3)} belong to no low-rank adapter of a linear layer"
            )
        if not all(torch.isfinite(t).all() for t in tensors.values()):
            raise InputError(KEY, f"{folder} holds NaN or infinite values")
        return cls(folder, config, down, up, whole)

    def scale(self, layer: str) -> float:
        """Return s of a layer."""
        rank = len(self.down[layer])
        alpha = float(self._of_layer("alpha_pattern", layer, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def add_to(self, network: nn.Module) -> list[str]:
        """Put the adapters on a network's layers, in place, and fill in modules that were trained whole.

        Returns:
            The names of the adapted layers.

        Raises:
            InputError: naming ``model.network.adapters``: the network lacks a layer or module, or it has
                another shape.
        """
        linear = [name for name, module in network.named_modules() if is_linear(module)]
        theirs, ours = self._prefixes(linear)
        for layer, down in self.down.items():
            rank = self._of_layer("rank_pattern", layer, self.config.get("r", 8))
            if len(down) != rank:
                raise InputError(KEY, f"{self.folder}: {layer} has rank {len(down)}, not {rank}")
            name = ours + layer.removeprefix(theirs)
            module = network.get_submodule(name)
            adapter = LowRankAdapter(module, len(down), 1.0, float(self.config.get("lora_dropout", 0.0)))
            adapter.scale = self.scale(layer)
            for own, tensor in ((adapter.down, down), (adapter.up, self.up[layer])):
                _fill(own.weight, tensor, f"{self.folder}: {layer}")
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, adapter)
        parameters = dict(network.named_parameters()) | dict(network.named_buffers())
        for name, tensor in self.whole.items():
            own_name = ours + name.removeprefix(theirs)
            if own_name not in parameters:
                raise InputError(
                    KEY,
                    f"{self.folder} holds {name} (modules_to_save), which this network lacks; "
                    "head=own keeps a classifier's",
                )
            _fill(parameters[own_name], tensor, f"{self.folder}: {name}")
        return [ours + layer.removeprefix(theirs) for layer in self.down]

    def _of_layer(self, pattern: str, layer: str, default: Any) -> Any:
        """Return a setting that some layers have for themselves, by patterns of the ends of their names."""
        for key, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", layer):
                return value
        return default

    def _prefixes(self, linear: Iterable[str]) -> tuple[str, str]:
        """Return what their names begin with and what takes its place in the network's names."""
        first, names = next(iter(self.down)), set(linear)
        found: dict[int, set[tuple[str, str]]] = {}
        for name in names:
            same = _common_end(first, name)
            theirs, ours = first.removesuffix(same), name.removesuffix(same)
            if same and all(
                n.startswith(theirs) and ours + n.removeprefix(theirs) in names for n in self.down
            ):
                found.setdefault(len(same), set()).add((theirs, ours))
        longest = found[max(found)] if found else set()
        if len(longest) != 1:
            base = self.config.get("base_model_name_or_path")
            raise InputError(
                KEY,
                f"{self.folder} has adapters of {shortened(list(self.down), 3)}, of {base}, which are no "
                f"layers of this network: {shortened(sorted(names), 6)}",
            )
        return longest.pop()


def write_adapters(
    network: nn.Module, folder: str | Path, base: str | None = None, inside: str | None = None
) -> None:
    """Write a network's adapters in the layout of PEFT; its other parameters are not written.

    Args:
        base: name or path of the model that has the adapters.
        inside: name of the module that PEFT is to wrap; the transformers model in the network when None.

    Raises:
        InputError: naming ``model.network.adapters``: the network has no adapters there.
        OSError: the folder can't be written.
    """
    folder = Path(folder)
    if inside is None:
        pretrained = (n for n, m in network.named_modules() if hasattr(m, "save_pretrained"))
        inside = next(pretrained, "")
    whole = network.get_submodule(inside)
    adapters = {n: m for n, m in whole.named_modules() if isinstance(m, LowRankAdapter)}
    if not adapters:
        raise InputError(KEY, f"the network has no low-rank adapters in {inside or 'it'}")
    tensors, ranks, alphas = {}, {}, {}
    for name, m in adapters.items():
        tensors[f"{PREFIX}{name}{A}"], tensors[f"{PREFIX}{name}{B}"] = m.down.weight, m.up.weight
        ranks[name] = len(m.down.weight)
        alphas[name] = m.scale * ranks[name]
    first = next(iter(adapters))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "lora_dropout": adapters[first].rate,
        "target_modules": list(adapters),
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alphas[first]},
        "bias": "none",
        "fan_in_fan_out": any(not isinstance(m.layer, nn.Linear) for m in adapters.values()),
        "use_rslora": False,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _refuse_others(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what fimo does not have, by its name."""
    if str(config.get("peft_type")).upper() != "LORA":
        raise InputError(KEY, f"{folder}: peft_type: expected LORA but got {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        raise InputError(KEY, f"{folder}: bias: expected none but got {config['bias']}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise InputError(
            KEY,
            f"{folder}: init_lora_weights: {start} changes the base model's weights, which the folder does "
            "not hold; convert the adapters when saving them (path_initial_model_for_weight_conversion)",
        )
    for name, value in config.items():
        if name not in HANDLED | HARMLESS and name != "bias" and value not in (None, False, [], {}):
            raise InputError(KEY, f"{folder}: {name}: expected nothing but got {value!r}")


def _common_end(a: str, b: str) -> str:
    """Return the longest common end of two names, in whole parts."""
    parts: list[str] = []
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        parts.insert(0, x)
    return ".".join(parts)


@torch.no_grad()
def _fill(own: Tensor, tensor: Tensor, what: str) -> None:
    if own.shape != tensor.shape:
        raise InputError(KEY, f"{what}: expected shape {tuple(own.shape)} but got {tuple(tensor.shape)}")
    own.copy_(tensor)
