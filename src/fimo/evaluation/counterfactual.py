"""Counterfactual removal: leave out the k instances a method holds most helpful, and see what happens."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.evaluation.assessment import AnyScores, of_all
from fimo.evaluation.lds import LeaveOut
from fimo.evaluation.metrics import mean_and_sem

CHANCE = "chance"
"""The curve of removing k instances at random: what a method must beat."""


def removal_curves(
    scores: AnyScores,
    leave_out: LeaveOut,
    instances: int,
    counts: Sequence[int] = (1, 3, 10, 30),
    random_sets: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Change of the mean test loss when a method's k most helpful instances are left out together.

    The more the loss rises, the better the method found what the model depends on. All methods' sets and
    the random ones are left out in one call of the engine.

    Args:
        scores: by method, those of all training instances, ``[J, N]``; where they
            follow further training, ``[E, J, N]``, the last evaluation point's choose the sets.
        counts: the numbers k.
        random_sets: random sets of each k, whose mean is the curve named ``chance``.

    Returns:
        ``method,step,epoch,removed,seeds,mean,sem``: mean over test instances and seeds, and its standard
        error over seeds (NaN with one seed).
    """
    if bad := [k for k in counts if not 0 < k < instances]:
        raise InputError("evaluation.removal.counts", f"expected 1 to {instances - 1} but got {bad}")
    generator = torch.Generator().manual_seed(seed)
    wanted: dict[tuple[str, int], list[list[int]]] = {}
    for name, given in scores.items():
        best = most_helpful(of_all(given, instances, name), instances)
        for k in counts:
            wanted[name, k] = [sorted(best[:k])]
    for k in counts:
        orders = [torch.randperm(instances, generator=generator) for _ in range(random_sets)]
        wanted[CHANCE, k] = [sorted(order[:k].tolist()) for order in orders]
    groups = [list(g) for g in dict.fromkeys(tuple(g) for sets in wanted.values() for g in sets)]
    place = {tuple(group): m for m, group in enumerate(groups)}
    found = leave_out(groups)
    frames = []
    for (name, k), sets in wanted.items():
        columns = [place[tuple(group)] for group in sets]
        per_seed = found.raw[..., columns].double().mean((2, 3))  # [S, E]
        mean, sem = mean_and_sem(per_seed.T)
        fixed = {"method": name, "step": found.step.tolist(), "epoch": found.epoch.tolist(), "removed": k}
        numbers = {"seeds": len(found.seeds), "mean": mean.tolist(), "sem": sem.tolist()}
        frames.append(pd.DataFrame({**fixed, **numbers}))
    return pd.concat(frames, ignore_index=True)


def most_helpful(scores: Tensor, instances: int) -> list[int]:
    """Return training instances by mean score over test instances, the most helpful first."""
    if scores.shape[-1] != instances:
        raise InputError("scores", f"expected all {instances} training instances but got {scores.shape[-1]}")
    last = scores[-1] if scores.ndim == 3 else scores
    return last.double().mean(0).argsort(descending=True, stable=True).tolist()
