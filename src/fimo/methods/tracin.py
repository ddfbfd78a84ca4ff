"""TracIn."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.base import Access
from fimo.methods.gradient import GradientMethod
from fimo.models.final_model import FinalModel


class TracIn(GradientMethod):
    """Inner products of loss gradients, summed over checkpoints of training (Pruthi et al., 2020, TracInCP).

    score[j, i] = sum_c lr_c <g_j(θ_c), g_i(θ_c)>. Where only the final model is known the sum has one term
    (access FiMO), which is Grad-Dot up to the learning rate.

    Args:
        checkpoints: files (Lightning, plain state_dict, safetensors) or state_dicts; the final model alone
            when None.
        lr: the learning rate at each checkpoint, or one for all.
        normalise: divide each gradient by its norm (the variant of later work; Grad-Cos for one checkpoint).
    """

    def __init__(
        self,
        checkpoints: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
        lr: float | Sequence[float] = 1.0,
        normalise: bool = False,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(memory_mb, storage, cache)
        self.checkpoints = None if checkpoints is None else list(checkpoints)
        count = 1 if self.checkpoints is None else len(self.checkpoints)
        self.rates = [float(lr)] * count if isinstance(lr, int | float) else [float(x) for x in lr]
        if count == 0 or len(self.rates) != count:
            raise InputError(
                "lr", f"expected one learning rate per checkpoint but got {len(self.rates)} for {count}"
            )
        self.normalise = normalise
        if self.checkpoints is not None:
            self.access = Access.CHECKPOINTS  # type: ignore[misc]

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        total, evaluations = torch.zeros(()), 0
        for model, rate in zip(self._models(), self.rates, strict=True):
            self.gradients = self.make_gradients(model)
            left, right = self.gradients.measurements(test), self.gradients.losses(left_out)
            products = left.gram(right)[:, 0, :, 0]
            if self.normalise:
                norms = left.squared_norms().sqrt() * right.squared_norms().sqrt().T
                products = products / norms.where(norms > 0, 1)
            total = rate * products + (total if total.dim() else 0)
            evaluations += self.gradients.evaluations
        self.gradients.evaluations = evaluations
        return total

    def _models(self) -> list[FinalModel]:
        if self.checkpoints is None:
            return [self.final_model]
        return [with_state(self.final_model, read_state(c)) for c in self.checkpoints]


def read_state(checkpoint: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by the network's names, without executing code from the file.

    Raises:
        InputError: the file is missing or holds no state_dict.
    """
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint)
    path = Path(checkpoint)
    if not path.is_file():
        raise InputError("checkpoints", f"no file {str(path)!r}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError("checkpoints", f"{str(path)!r} holds no state_dict")
    return state


def with_state(final_model: FinalModel, state: Mapping[str, Tensor]) -> FinalModel:
    """Return the same model with other parameters and buffers; a common prefix of names is dropped.

    Raises:
        InputError: names or shapes don't fit the network.
    """
    names = final_model.network.state_dict().keys()
    for prefix in ("", "network.", "model."):
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if names <= found.keys():
            break
    else:
        raise InputError("checkpoints", f"a checkpoint lacks {sorted(names - state.keys())[0]!r}")
    network = copy.deepcopy(final_model.network)
    try:
        network.load_state_dict({k: found[k] for k in names})
    except RuntimeError as error:
        raise InputError("checkpoints", str(error).splitlines()[-1].strip()) from error
    return FinalModel(network, final_model.loss, final_model.measurement, final_model.trainable)
