"""Real further training without groups of rows, as the later stages of an audit ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.further_training.gold_standard import further_train
from fimo.models.final_model import FinalModel
from fimo.store.files import Store


@dataclass(frozen=True)
class Removed:
    """What changed at the end of further training without each of L groups of rows.

    Args:
        full: ``[S, J]`` float64, values of the full runs.
        change: ``[S, J, L]`` float64, values without a group minus those of the full run of the same seed.
    """

    full: Tensor
    change: Tensor

    @property
    def without(self) -> Tensor:
        """Values ``[S, J, L]`` of the runs without each group."""
        return self.full[..., None] + self.change


@dataclass(frozen=True)
class Removal:
    """Leaves groups of training rows out of further training.

    A group's runs are compared with the full runs of their seeds and nothing is subtracted. Under ``shift``
    other batches follow in every run without some rows, which is in the changes and in their errors.

    Args:
        train: all N training instances, as admitted.
        protocol: whose end counts.
        seeds: S.
        store: that keeps runs; nothing is kept when None.
        trainer: arguments of the Lightning Trainer.
    """

    train: Instances
    protocol: Protocol
    seeds: Sequence[int]
    store: Store | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, final_model: FinalModel, test: Instances, groups: Sequence[Sequence[int]]) -> Removed:
        """Leave each of L groups out, and measure J test instances.

        Args:
            final_model: with the measurement.
            groups: positions of training rows; the same group may occur twice.
        """
        units = [tuple(sorted(set(group))) for group in groups]
        distinct = list(dict.fromkeys(units))
        found = further_train(
            final_model, self.train, test, self.protocol, list(self.seeds), distinct, store=self.store,
            trainer=self.trainer, keep_states=False,
        )  # fmt: skip
        place = torch.tensor([distinct.index(unit) for unit in units])
        assert found.full_losses is not None
        return Removed(found.full_losses[:, -1].double(), found.raw[:, -1].double()[..., place])


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the first axis (seeds), and its standard error; NaN of a single one."""
    return values.mean(0), values.std(0) / len(values) ** 0.5 if len(values) > 1 else values[0] * torch.nan
