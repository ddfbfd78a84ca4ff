"""Error bars of groups of instances."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fimo.app.plan import Plan
from fimo.app.scoring import Scoring
from fimo.cost import Cost
from fimo.further_training import Protocol
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.following import FollowingMethod
from fimo.scores import Scores
from fimo.store.files import Store
from tests.cases import CASES


class Known(FollowingMethod):
    """Three instances' scores, with bars of given variances."""

    def __init__(self, own: torch.Tensor, common: float) -> None:
        self.own, self.common = own, common

    def scores(self, problem: AttributionProblem) -> Scores:
        found = torch.arange(1.0, 1 + len(self.own)).expand(1, len(problem.test), -1)
        raw, adjusted = (self.own + self.common).sqrt(), self.own.sqrt()
        return self.result(
            problem,
            found,
            sem=raw.expand_as(found),
            sem_adjusted=adjusted.expand_as(found),
            withheld="half of them: a test",
        )


def test_a_group_s_bar_is_the_root_of_squares_and_what_all_share_adds_up(tmp_path: Path) -> None:
    case = CASES["mlp_regression"]()
    data: Any = SimpleNamespace(train=case.train, test=case.test)
    plan = Plan(Protocol(epochs=1), [0], [0], [[1, 2], [5], [6, 7]], [0, 2], True, "auto")
    own = torch.tensor([9.0, 16.0, 4.0, 1.0, 1.0])
    for common in (0.0, 2.0):
        store = Store(tmp_path / str(common))
        for _ in range(2):  # computed, and read
            scoring = Scoring.of(case.final_model, data, plan, 0, store, torch.device("cpu"))
            found = scoring.scores("known", Known(own, common), {}, Cost("known"))
            assert found.sem is not None
            assert found.sem_adjusted is not None
            torch.testing.assert_close(found.values[0, 0], torch.tensor([3.0, 3.0, 9.0]))
            # variances by hand: members' own, plus the square of the sum of what they share
            expected = torch.tensor([25.0, 4.0, 2.0]) + common * torch.tensor([4.0, 1.0, 4.0])
            torch.testing.assert_close(found.sem[0, 0].square(), expected)
            difference = torch.tensor([2.0, 1.0, 2.0]) - 5 / 3
            expected = torch.tensor([25.0, 4.0, 2.0]) + common * difference.square()
            torch.testing.assert_close(found.sem_adjusted[0, 0].square(), expected)
            assert found.withheld == "half of them: a test"
            assert found.bars(subtract_mean=True) is found.sem_adjusted
            assert found.bars(subtract_mean=False) is found.sem
