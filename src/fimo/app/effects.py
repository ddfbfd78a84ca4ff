"""``effects.csv``: what was measured and predicted of every pair, under the user's own names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fimo.data.datamodule import InstancesModule, Split
from fimo.data.origin import Origin
from fimo.evaluation.assessment import adjusted_scores
from fimo.further_training.sensitivity import Sensitivity, adjust
from fimo.scores import Scores
from fimo.store.files import written_aside

BLOCK = 200_000
"""Pairs written at once."""


def with_rows(sensitivity: Sensitivity, data: InstancesModule) -> Sensitivity:
    """Return a sensitivity that says which rows of the user's file its instances are."""
    rows = {split: torch.from_numpy(data.origin(split).row) for split in ("train", "test")}
    return replace(
        sensitivity,
        left_out_row=rows["train"][sensitivity.left_out],
        test_row=rows["test"][sensitivity.test],
    )


def ids_of(sensitivity: Sensitivity, data: InstancesModule, split: Split) -> list[str]:
    """Return the identifiers of the left-out (``train``), or of the test instances; of groups, all members'.

    Where there are none, the rows stand for them.
    """
    names = data.origin(split).ids
    if split == "test":
        return [names[j] for j in sensitivity.test.tolist()]
    if sensitivity.groups is None:
        return [names[i] for i in sensitivity.left_out.tolist()]
    return [" ".join(names[i] for i in group if i >= 0) for group in sensitivity.groups.tolist()]


def write_effects(
    path: Path, sensitivity: Sensitivity, scores: Mapping[str, Scores], data: InstancesModule
) -> None:
    """Write ``effects.csv``: a line for each pair of a test and a left-out instance (or group).

    ``effect`` is the sensitivity at the last evaluation point and ``effect_sem`` its standard error over
    seeds, both adjusted as the sensitivity is; then each method's score, as it is judged. ``train_row`` of a
    group is its first member's, ``train_id`` all members' identifiers.
    """
    with written_aside(path) as aside:
        for first, block in enumerate(_blocks(sensitivity, scores, data)):
            block.to_csv(aside, index=False, header=not first, mode="a" if first else "w")


def _blocks(
    sensitivity: Sensitivity, scores: Mapping[str, Scores], data: InstancesModule
) -> Iterator[pd.DataFrame]:
    train = _columns("train", sensitivity.left_out, data.origin("train"), sensitivity, data)
    test = _columns("test", sensitivity.test, data.origin("test"), sensitivity, data)
    seeds, tests, left_out = len(sensitivity.seeds), len(sensitivity.test), len(sensitivity.left_out)
    judged = {
        name: adjusted_scores(s.values, s.predicts_loss_change, sensitivity.subtract_mean)
        for name, s in scores.items()
    }
    size = max(1, BLOCK // left_out)
    for start in range(0, tests, size):
        chosen = slice(start, min(start + size, tests))
        changes = adjust(sensitivity.raw[:, -1, chosen], sensitivity.subtract_mean).double()
        sem = changes.std(0) / seeds**0.5 if seeds > 1 else torch.full_like(changes[0], torch.nan)
        values = {"effect": changes.mean(0), "effect_sem": sem}
        values |= {n: (s[-1] if s.ndim == 3 else s)[chosen] for n, s in judged.items()}
        count = chosen.stop - start
        yield pd.DataFrame(
            {n: np.repeat(column[chosen], left_out) for n, column in test.items()}
            | {n: np.tile(column, count) for n, column in train.items()}
            | {n: v.flatten().cpu().numpy().astype(np.float32) for n, v in values.items()}
        )


def _columns(
    split: Split, index: torch.Tensor, origin: Origin, sensitivity: Sensitivity, data: InstancesModule
) -> dict[str, np.ndarray]:
    ids = np.array(ids_of(sensitivity, data, split), dtype=object)
    return {f"{split}_row": origin.row[index.numpy()], f"{split}_id": ids}
