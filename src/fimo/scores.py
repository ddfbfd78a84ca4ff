"""What an attribution method returns: scores, their standard errors, and what was needed for them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fimo.errors import InputError
from fimo.store.files import read_tensors, write_tensors


class Access(StrEnum):
    """What a method needs to see (Wei et al., 2025, section 2)."""

    FINAL_MODEL = "FiMO"
    CHECKPOINTS = "CPA"
    TRAINING_ALGORITHM = "TAA"


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Scores of test instances for left-out training instances, as one method computed them.

    Sign: a positive score means that removing the training instance raises the test loss.

    Args:
        values: ``[J, L]``, or ``[E, J, L]`` where the method predicts each amount of further training.
        left_out: ``[L]`` int64, indices into the training set (of groups: their first members).
        method: its name.
        access: what it saw.
        predicts_loss_change: whether values are in units of test loss (else only their order matters).
        sem: standard errors of ``values`` (same shape); None where they are not known.
        sem_adjusted: the same of ``values`` minus their mean over left-out instances.
        withheld: why standard errors are missing, or NaN in part; empty where that needs no reason.
        step: ``[E]`` int64, optimizer steps of further training, where values have that axis and it is known.
        epoch: ``[E]`` int64, epochs completed or begun at each of these.
        followed: seeds whose runs of further training the method followed.
        gradient_evaluations: gradients of one instance's loss, or products with its Jacobian: the declared
            cost, without that of full runs which are handed over.
        notes: what a reader must know of this computation: choices made and why, convergence, trust.
        groups: ``[L, G]`` int64, members of left-out groups, padded with -1; None for single instances.
        test: ``[J]`` int64, which instances of a larger test set these are, where that is known.

    Raises:
        InputError: shapes that don't fit.
    """

    values: Tensor
    left_out: Tensor
    method: str = ""
    access: Access = Access.FINAL_MODEL
    predicts_loss_change: bool = False
    sem: Tensor | None = None
    sem_adjusted: Tensor | None = None
    withheld: str = ""
    step: Tensor | None = None
    epoch: Tensor | None = None
    followed: tuple[int, ...] = ()
    gradient_evaluations: int = 0
    notes: tuple[str, ...] = ()
    groups: Tensor | None = None
    test: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        if len(shape) not in (2, 3) or shape[-1] != len(self.left_out):
            expected = f"[J, {len(self.left_out)}] or [E, J, {len(self.left_out)}]"
            raise InputError("scores", f"expected the shape {expected} but got {list(shape)}")
        for name in ("sem", "sem_adjusted"):
            bars = getattr(self, name)
            if bars is not None and tuple(bars.shape) != shape:
                raise InputError(name, f"expected the scores' shape {list(shape)} but got {list(bars.shape)}")
        for name in ("step", "epoch"):
            points = getattr(self, name)
            if points is not None and (len(shape) != 3 or len(points) != shape[0]):
                raise InputError(name, f"does not fit scores of shape {list(shape)}")

    def __repr__(self) -> str:
        *points, tests, left_out = self.values.shape
        along = f", at {points[0]} amounts of further training" if points else ""
        return f"Scores({self.method} ({self.access}): {tests} test x {left_out} left-out instances{along})"

    @property
    def last(self) -> Tensor:
        """Values ``[J, L]`` after all further training (where they have that axis)."""
        return self.values[-1] if self.values.ndim == 3 else self.values

    def bars(self, subtract_mean: bool) -> Tensor | None:
        """Return the standard errors of values as they are judged: adjusted as the sensitivity is.

        Those of raw values stand in where only they are known.
        """
        adjusted = self.sem_adjusted if subtract_mean else None
        return self.sem if adjusted is None else adjusted

    def to(self, device: torch.device | str) -> Scores:
        """Return the same with all tensors on a device."""
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: ``scores``, ``left_out`` and what else is known, the rest as metadata."""
        tensors = {name: getattr(self, field) for name, field in TENSORS.items()}
        tensors["followed_seeds"] = torch.tensor(self.followed) if self.followed else None
        rest = {name: json.dumps(getattr(self, name)) for name in METADATA}
        write_tensors(Path(path), {k: v for k, v in tensors.items() if v is not None}, rest)

    @classmethod
    def load(cls, path: Path | str) -> Scores:
        """Read what :meth:`save` wrote, or a file with ``scores`` and ``left_out`` alone."""
        with safe_open(path, "pt") as file:
            rest = {k: json.loads(v) for k, v in (file.metadata() or {}).items() if k in METADATA}
        tensors = read_tensors(Path(path))
        fields: dict[str, Any] = {field: tensors.get(name) for name, field in TENSORS.items()}
        followed = tensors.get("followed_seeds", torch.tensor([])).long()
        rest["notes"] = tuple(rest.get("notes", ()))
        rest["access"] = Access(rest.get("access", Access.FINAL_MODEL))
        return cls(**fields, followed=tuple(followed.tolist()), **rest)


TENSORS = {
    "scores": "values",
    **{name: name for name in ("left_out", "test", "sem", "sem_adjusted", "step", "epoch", "groups")},
}
"""Of a file of scores: the field that each of its tensors holds."""

METADATA = ("method", "access", "predicts_loss_change", "withheld", "gradient_evaluations", "notes")
"""Fields that are kept beside them, as JSON."""
