"""The linear datamodeling score: do summed scores predict the effect of leaving out many instances?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.evaluation.assessment import COLUMNS, AnyScores, assess, of_all
from fimo.further_training.sensitivity import Sensitivity
from fimo.scores import Scores

LeaveOut = Callable[[list[list[int]]], Sensitivity]
"""Further training (or re-training) leaving out each of some groups of training instances."""


def datamodeling_score(
    scores: AnyScores,
    leave_out: LeaveOut,
    instances: int,
    subsets: int = 50,
    share: float = 0.5,
    seed: int = 0,
    followed: Mapping[str, Sequence[int]] | None = None,
) -> pd.DataFrame:
    r"""Linear datamodeling score (Park et al., 2023, TRAK) by further training on random subsets.

    For random left-out sets G_m of ``share`` of the N training instances:

    .. math::
        \mathrm{LDS}_{ej} = \mathrm{spearman}_m \Big( \sum_{i \in G_m} x_{ji}, \;
            \ell_{ej}(\text{leaving out } G_m) - \ell_{ej}(\text{full}) \Big)

    Both sides are effects of leaving out, so that a model whose losses are linear in which instances are
    there scores +1; with outputs instead of losses, or kept instead of left-out sets, signs would differ.

    Args:
        scores: by method, those of all training instances (``[J, N]`` or ``[E, J, N]``).
        leave_out: runs the engine once for all sets, returning ``[S, E, J, M]`` raw changes.
        instances: N.
        subsets: M, the number of left-out sets.
        share: of the training set that each leaves out, in (0, 1).
        seed: of the sets.
        followed: by method, the seeds whose runs it followed; as scores say when None.

    Returns:
        columns of ``evaluation.csv`` with ``lds`` as metric, and all seeds averaged; mean ± SEM over test
        instances, and the noise ceiling of this gold standard.
    """
    groups = random_subsets(instances, subsets, share, torch.Generator().manual_seed(seed))
    summed: dict[str, Scores | tuple[str, Tensor]] = {}
    for name, given in scores.items():
        values = group_scores(of_all(given, instances, name), groups, instances)
        if isinstance(given, Scores):
            members = replace(given, sem=None, sem_adjusted=None, test=None).grouped(groups)
            summed[name] = replace(members, values=values)
        else:
            summed[name] = given[0], values
    # ranks don't change when a constant is subtracted
    sensitivity = replace(leave_out(groups), subtract_mean=False)
    table = assess(
        summed, sensitivity, ["spearman"], [len(sensitivity.seeds)], followed=followed, resamples=0
    ).table
    return table.assign(metric="lds")[COLUMNS]


def random_subsets(instances: int, subsets: int, share: float, generator: torch.Generator) -> list[list[int]]:
    """Return M sorted random sets of ``share`` of ``range(instances)``."""
    size = round(share * instances)
    if not 0 < size < instances:
        raise InputError(
            "evaluation.datamodeling.share",
            f"expected a share that leaves out some, not all of {instances} instances but got {share}",
        )
    if subsets < 3:
        raise InputError("evaluation.datamodeling.subsets", f"expected at least 3 but got {subsets}")
    return [sorted(torch.randperm(instances, generator=generator)[:size].tolist()) for _ in range(subsets)]


def group_scores(scores: Tensor, groups: Sequence[Sequence[int]], instances: int) -> Tensor:
    """Return sums of scores over groups: ``[..., J, N] -> [..., J, M]``, in float64."""
    if scores.shape[-1] != instances:
        raise InputError("scores", f"expected all {instances} training instances but got {scores.shape[-1]}")
    members = torch.zeros(len(groups), instances, dtype=torch.float64)
    for m, group in enumerate(groups):
        members[m, list(group)] = 1
    return scores.double().cpu() @ members.T
