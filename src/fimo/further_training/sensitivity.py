"""From runs' test losses to the sensitivity: the gold standard."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.further_training.distribution import compared
from fimo.models.measured import Measured
from fimo.store.files import read_as, written_aside

log = logging.getLogger(__name__)

HASHES = ("test_hash", "train_hash", "model_hash")
"""Of what a sensitivity, or scores, are of."""


@dataclass(frozen=True)
class Sensitivity:
    """Changes of test losses (or what else is measured) when an instance is left out of further training.

    Args:
        raw: ``[S, E, J, L]`` float32, loss of j leaving out i minus loss of j in the full run, per seed.
        step: ``[E]`` int64, optimizer steps of the full run at each evaluation point.
        epoch: ``[E]`` int64, epochs completed or begun at each evaluation point.
        left_out: ``[L]`` int64, indices into the training set.
        test: ``[J]`` int64, indices into the test set.
        seeds: ``[S]`` int64.
        subtract_mean: whether the adjusted change subtracts the mean over left-out instances (paper,
            eq. 17) or is the raw change (eq. 13).
        distance_full: ``[S, E]``, Euclidean distance of the full run's parameters from the final model's.
        distance: ``[S, E, L]``, the same of the runs leaving out instances.
        full_losses: ``[S, E, J]`` float64, test losses of the full runs.
        groups: ``[L, G]`` int64, where groups are left out: their members, padded with -1 (``left_out`` then
            holds the first of each).
        left_out_row, test_row: ``[L]``, ``[J]`` int64, where it is known, the 0-based data rows of the user's
            file that they are; of groups, as ``left_out``, their first members'.
        test_hash, train_hash, model_hash: of the test instances' content, of (a sample of) the training
            instances' and of the final model's, where they are known, so that scores of others are refused.
        measured: what they are changes of, and which direction of it is better; None where it isn't known.
    """

    raw: Tensor
    step: Tensor
    epoch: Tensor
    left_out: Tensor
    test: Tensor
    seeds: Tensor
    subtract_mean: bool = True
    distance_full: Tensor | None = None
    distance: Tensor | None = None
    full_losses: Tensor | None = None
    groups: Tensor | None = None
    left_out_row: Tensor | None = None
    test_row: Tensor | None = None
    test_hash: str = ""
    train_hash: str = ""
    model_hash: str = ""
    measured: Measured | None = None

    @property
    def adjusted(self) -> Tensor:
        """Adjusted changes ``[S, E, J, L]`` of each seed."""
        return adjust(self.raw, self.subtract_mean)

    @functools.cached_property
    def sensitivity(self) -> Tensor:
        """The gold standard ``[E, J, L]``: adjusted changes averaged over seeds; computed once."""
        return adjust(self.raw.mean(0), self.subtract_mean)

    def distribution(self, point: int = -1, permutations: int = 999, seed: int = 0) -> pd.DataFrame:
        """Return what leaving out does to the distribution of test losses over seeds, not only to its mean.

        See :class:`~fimo.further_training.distribution.DistributionChange`.

        Args:
            point: position of the evaluation point; the last when -1.
            permutations: random ones, by which p-values are computed; all 2^S where these are no more.
            seed: of the permutations.

        Returns:
            A row for each test and left-out instance: ``step,epoch,test,train``, ``test_row,train_row`` where
            they are known, then ``mean,mean_p,variance_full,variance_without,variance_p,wasserstein,
            wasserstein_p``.

        Raises:
            InputError: fewer than two seeds, no such point, or raw changes or full runs' losses are not kept.

        Example:
            >>> losses = torch.rand(9, 1, 2, generator=torch.Generator().manual_seed(0))
            >>> raw = torch.stack([0 * losses, 0.5 + 0 * losses], -1)
            >>> axes = {"step": torch.tensor([9]), "epoch": torch.tensor([1]), "left_out": torch.arange(2)}
            >>> axes |= {"test": torch.arange(2), "seeds": torch.arange(9)}
            >>> found = Sensitivity(raw, **axes, full_losses=losses).distribution()
            >>> found["wasserstein"].round(6).tolist()
            [0.0, 0.5, 0.0, 0.5]
        """
        if self.full_losses is None:
            raise InputError("sensitivity", "the full runs' losses are not known, only changes")
        if not -len(self.step) <= point < len(self.step):
            raise InputError("point", f"expected -{len(self.step)} to {len(self.step) - 1} but got {point}")
        full = self.full_losses[:, point].double()
        without = full[..., None] + self.raw[:, point].double()
        found = compared(full, without, permutations, seed)
        tests, left_out = len(self.test), len(self.left_out)
        columns: dict[str, Any] = {"step": int(self.step[point]), "epoch": int(self.epoch[point])}
        for suffix, mine, theirs in (
            ("", self.test, self.left_out),
            ("_row", self.test_row, self.left_out_row),
        ):
            if mine is not None and theirs is not None:
                columns[f"test{suffix}"] = mine.repeat_interleave(left_out).numpy()
                columns[f"train{suffix}"] = theirs.repeat(tests).numpy()
        columns |= {name: values.flatten().numpy() for name, values in vars(found).items()}
        return pd.DataFrame(columns)

    def save(self, path: Path | str, with_raw: bool = True) -> None:
        """Write ``sensitivity.safetensors``: the sensitivity, all axes, and the raw changes if asked."""
        tensors = {
            "sensitivity": self.sensitivity,
            "step": self.step,
            "epoch": self.epoch,
            "left_out": self.left_out,
            "test": self.test,
            "seeds": self.seeds,
        }
        for name in ("distance_full", "distance", "full_losses", "groups", "left_out_row", "test_row"):
            if (tensor := getattr(self, name)) is not None:
                tensors[name] = tensor
        if with_raw:
            tensors["raw"] = self.raw
        metadata = {"subtract_mean": str(self.subtract_mean).lower()}
        known = {name: value for name in HASHES if (value := getattr(self, name))}
        if self.measured is not None:
            known["measured"] = json.dumps(asdict(self.measured))
        write_in_pieces(Path(path), tensors, metadata | known)

    @classmethod
    def load(cls, path: Path | str, subtract_mean: bool | None = None) -> Sensitivity:
        """Read what :meth:`save` wrote, adjusted as it was saved.

        See :func:`~fimo.further_training.sensitivity.load_sensitivity`.

        Args:
            subtract_mean: adjust in this way instead, which needs the raw changes.

        Raises:
            InputError: the file holds no sensitivity, or the other adjustment is asked for and it has no raw
                changes.
        """
        found, has_raw = load_sensitivity(path)
        if subtract_mean is None or subtract_mean == found.subtract_mean:
            return found
        if not has_raw:
            raise InputError(
                "subtract_mean",
                f"{path} has no raw changes, only those saved with subtract_mean={found.subtract_mean}",
            )
        return replace(found, subtract_mean=subtract_mean)


def load_sensitivity(path: Path | str) -> tuple[Sensitivity, bool]:
    """Read a sensitivity with its adjustment, and whether its raw changes were kept.

    Where they were not, the adjusted mean over seeds stands for the raw change of one seed: agreements with
    all seeds are the same, and nothing that needs single seeds is shown.
    """
    tensors, metadata = read_as(Path(path), "sensitivity")
    adjusted = metadata.get("subtract_mean", "true") == "true"
    mean = tensors.pop("sensitivity")
    has_raw = "raw" in tensors
    if not has_raw:
        tensors["raw"] = mean[None]
    fields: dict[str, Any] = tensors | {name: metadata.get(name, "") for name in HASHES}
    if "measured" in metadata:
        fields["measured"] = Measured(**json.loads(metadata["measured"]))
    found = Sensitivity(**fields, subtract_mean=adjusted)
    return found, has_raw


def adjust(raw: Tensor, subtract_mean: bool = True) -> Tensor:
    """Return raw changes ``[..., J, L]``, minus their mean over left-out instances if asked (eqs. 13, 17)."""
    return raw - raw.mean(-1, keepdim=True) if subtract_mean else raw.clone()


def write_in_pieces(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all, without a copy of a large (mapped) tensor in memory.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    names = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            for piece in t.detach().cpu().contiguous().reshape(-1).split(2**22):
                file.write(piece.numpy().tobytes())


def check_finite(changes: Tensor) -> None:
    """Warn of runs that diverged, and end where nothing is left at the end of further training.

    Args:
        changes: of losses, or scores that predict them, ``[..., E, J, L]``.

    Raises:
        InputError: none is finite at the last evaluation point.
    """
    finite = torch.isfinite(changes)
    if not finite[..., -1, :, :].any():
        raise InputError("further_training.lr", "all runs diverged: no loss change is finite; lower it?")
    if not finite.all():
        share = 1 - float(finite.float().mean())
        log.warning("further training diverged in part: %.1f %% of it is not finite", 100 * share)
