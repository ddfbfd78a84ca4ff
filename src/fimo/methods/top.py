"""The most helpful and most harmful training instances, without keeping all J x N scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel


@dataclass(frozen=True)
class Top:
    """The extreme scores of each test instance.

    Args:
        helpful, helpful_index: ``[J, k]`` the largest scores, descending, and their training instances.
        harmful, harmful_index: ``[J, k]`` the smallest scores, ascending, and their training instances.
    """

    helpful: Tensor
    helpful_index: Tensor
    harmful: Tensor
    harmful_index: Tensor


def top_k(
    method: AttributionMethod,
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    k: int = 10,
    block: int = 4096,
) -> Top:
    """Score training instances block by block and keep the k largest and smallest: memory J·(k + block).

    Args:
        method: one whose scores are ``[J, L]`` and don't depend on which instances are scored together.
        block: training instances scored at once.

    Raises:
        InputError: k is not between 1 and N, or the method follows further training.
    """
    if not 1 <= k <= len(train):
        raise InputError("k", f"expected 1 to {len(train)} but got {k}")
    if method.follows_further_training:
        raise InputError("method", "top_k needs one score for each pair, not one for each evaluation point")
    method.fit(final_model, train)
    best: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(train), block):
        scores = method.scores(test, train[start : start + block])
        index = torch.arange(start, start + scores.shape[1], device=scores.device).expand_as(scores)
        for side, sign in enumerate((1, -1)):
            candidates, places = sign * scores, index
            if len(best) > side:
                candidates = torch.cat([best[side][0], candidates], 1)
                places = torch.cat([best[side][1], places], 1)
            kept, where = candidates.topk(min(k, candidates.shape[1]), 1)
            found = kept, places.gather(1, where)
            if len(best) > side:
                best[side] = found
            else:
                best.append(found)
    return Top(best[0][0], best[0][1], -best[1][0], best[1][1])
