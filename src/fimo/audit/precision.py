"""The dtype of an audit's real runs: float64 where float32 can't resolve what one row changes."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from fimo.audit.question import Question, Resources
from fimo.audit.screen import Screened
from fimo.engine.context import Setting, chunk_size
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica
from fimo.engine.threads import side_by_side
from fimo.further_training.resolution import losses

log = logging.getLogger(__name__)

TRIED = 8
"""Rows at the top of the mean test loss's scores, half of them on each side."""

ROUNDED = 0.25
"""Share of their effects that rounding may be: it is noise that other seeds don't share, and so costs seeds,
while runs in float64 take twice as long."""


def resolved(question: Question, screened: Screened, resources: Resources) -> Question:
    """Return a question whose runs resolve the effects of the rows that matter most.

    Of 50,000 rows, one changes the mean test loss by less than what float32 rounds off in some thousand
    steps, and training amplifies rounding as it does any change. So the first seed's runs without the rows at
    both ends of the scores are made in float32 and in float64; where their effects differ by much, all runs
    of the audit are made in float64. A protocol in any other dtype is taken as it is.
    """
    protocol = question.protocol
    if protocol.dtype != "float32" or protocol.evaluation_dtype != "float64":
        return question
    wide = replace(protocol, dtype="float64")
    order = screened.score[0].argsort(stable=True)
    count = min(TRIED, len(order)) // 2
    rows = torch.cat([order[:count], order[len(order) - count :]])
    narrow_effects, wide_effects = side_by_side(
        lambda which: _effects(question, which, rows, resources), [protocol, wide], torch.get_num_threads()
    )
    rounding = (narrow_effects - wide_effects).square().mean(1)
    share = float((rounding / wide_effects.square().mean(1)).nan_to_num(0.0).max().sqrt())
    if share <= ROUNDED:
        return question
    log.info("runs are made in float64: in float32, rounding is %.0f %% of the largest effects", 100 * share)
    return replace(question, protocol=wide)


def _effects(question: Question, protocol: Protocol, rows: Tensor, resources: Resources) -> Tensor:
    """Return the changes ``[M, R]`` of the targets by the first seed, under shift minus their mean."""
    model, measured = question.measured
    setting = Setting.build(
        model, question.train, measured, replace(protocol, evaluate_every="end"), resources.device
    )
    # a run of another width than the full one's can't be made with it
    full = losses(setting, [Replica(0)])[-1]
    parts = rows.split(chunk_size(setting, len(rows)))
    without = torch.cat(
        [losses(setting, [Replica(0, (row,)) for row in part.tolist()])[-1] for part in parts]
    )
    weight = question.weight[[m for m, target in enumerate(question.targets) if target.sides]]
    changes = torch.einsum("mj,rj->mr", weight, (without - full).double().cpu())
    return changes if question.rule.shares_batches else changes - changes.mean(1, keepdim=True)
