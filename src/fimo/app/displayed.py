"""Instances as reports show them, with what the final model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from fimo.data.datamodule import InstancesModule, Split
from fimo.models.final_model import FinalModel
from fimo.reporting.instance_table import InstanceDisplay

AT_ONCE = 2**24
"""Outputs in memory at a time: an instance of a language model has as many as tokens times words."""


def displayed(
    data: InstancesModule, final_model: FinalModel, split: Split, positions: Sequence[int]
) -> Iterator[InstanceDisplay]:
    """Yield some instances of a part as a report shows them, in bounded memory."""
    if not len(positions):
        return
    part = getattr(data, split)
    at_once = max(1, AT_ONCE // final_model.outputs(part[[positions[0]]]).numel())
    for start in range(0, len(positions), at_once):
        chosen = list(positions[start : start + at_once])
        batch = part[chosen]
        with torch.no_grad():
            outputs = final_model.outputs(batch)
            losses = final_model.loss(outputs, batch.targets)
            by_token = final_model.loss.by_token(outputs, batch.targets)
        for k, position in enumerate(chosen):
            pieces = data.pieces(split, position)
            yield InstanceDisplay(
                **asdict(data.named(split, position)),
                prediction=data.predicted(split, position, outputs[k]),
                loss=float(losses[k]),
                tokens=pieces,
                token_losses=of_tokens(by_token[k], len(pieces)) if pieces and by_token is not None else None,
            )


def of_tokens(losses: Tensor, tokens: int) -> tuple[float | None, ...]:
    """Return each token's loss, rounded; None of those that are not predicted.

    Args:
        losses: ``[T]``, at position t of token t + 1; NaN where nothing is predicted.
        tokens: how many there are; the first has nothing before it.
    """
    found = losses[: tokens - 1]
    return (None, *(None if value.isnan() else float(f"{value.item():.3g}") for value in found))
