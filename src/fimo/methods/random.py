"""Random scores: the level that every method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod


class RandomScores(AttributionMethod):
    """Independent standard normal scores, the same in every run with the same seed.

    Args:
        seed: of the scores.
    """

    needs = "nothing"
    cost = "nothing"
    use = "a baseline: what chance gives"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, problem: AttributionProblem) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        first = next(iter(problem.final_model.parameters().values()))
        shape = len(problem.test), len(problem.index)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(first)
