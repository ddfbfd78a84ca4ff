"""What the response along a path costs of the gold standard, estimated before anything long is run."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from fimo.data.instances import Instances
from fimo.further_training.trajectory import FurtherTraining
from fimo.models.final_model import FinalModel

ALONE = 3.0
"""Time of an instance's own row of a Jacobian, in gradients of an instance within a batch."""


def forward_operations(final_model: FinalModel, instances: Instances) -> int:
    """Return the floating-point operations of an instance's forward pass: products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        final_model.outputs(instances[:1])
    return max(1, int(counter.get_total_flops()))


def response_share(
    final_model: FinalModel,
    train: Instances,
    further_training: FurtherTraining,
    *,
    left_out: int,
    rows: int,
    outputs: int,
    kernels: int,
    segments: int,
    memory_mb: float,
) -> float:
    """Return what the response costs of the gold standard's arithmetic, within about a factor of two.

    For networks whose Jacobians aren't factored: their rows are formed, again for each block of those that
    memory holds where it doesn't hold all, and multiplied with each other.

    Args:
        left_out: L.
        rows: of the training set's Jacobian.
        outputs: rows of the test instances' Jacobian.
        kernels: that are computed, over seeds and segments.
        segments: of a run.
    """
    given, p, seeds = further_training, final_model.size, len(further_training.seeds)
    gradient = 3.0 * forward_operations(final_model, train)
    run = given.protocol.run_gradients(len(train)) * gradient
    itemsize = next(iter(final_model.parameters().values())).element_size()
    blocks = math.ceil((rows + outputs) * p * itemsize / (memory_mb * 2**20))
    passes = 1 if blocks <= 1 else 1 + blocks
    forming = ALONE * gradient * (rows + outputs)
    kernel = passes * forming + 2.0 * rows * (rows + outputs) * p
    carried = 4.0 * seeds * (segments - 1) * (rows + outputs) * p * left_out
    carried += seeds * (segments - 1) * (forming if blocks > 1 else 0.0) * 3
    return (seeds * run + kernels * kernel + carried) / (seeds * (left_out + 1) * run)
