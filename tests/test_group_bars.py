"""Error bars of groups of instances."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf

from fimo.app.plan import Plan
from fimo.app.scoring import described, score, withheld
from fimo.cost import Cost
from fimo.evaluation.assessment import judged_bars
from fimo.further_training import Protocol
from fimo.methods.error_bars import ErrorBars
from fimo.methods.following import FollowingMethod
from fimo.store.files import Store
from tests.cases import CASES


class Known(FollowingMethod):
    """Three instances' scores, with bars of given variances."""

    def __init__(self, own: torch.Tensor, common: float) -> None:
        self.own, self.common = own, common

    def scores(self, test: Any, left_out: Any) -> torch.Tensor:
        found = torch.arange(1.0, 1 + len(self.own)).expand(1, len(test), -1)
        raw, adjusted = (self.own + self.common).sqrt(), self.own.sqrt()
        self.bars = ErrorBars(raw.expand_as(found), adjusted.expand_as(found), "half of them: a test")
        return found


def test_a_group_s_bar_is_the_root_of_squares_and_what_all_share_adds_up(tmp_path: Path) -> None:
    case = CASES["mlp_regression"]()
    data: Any = SimpleNamespace(train=case.train, test=case.test)
    plan = Plan(Protocol(epochs=1), [0], [0], [[1, 2], [5], [6, 7]], [0, 2], True, "auto")
    config = OmegaConf.create({"seed": 0, "methods": {"known": {}}})
    problem = described(case.final_model, data)
    own = torch.tensor([9.0, 16.0, 4.0, 1.0, 1.0])
    for common in (0.0, 2.0):
        store = Store(tmp_path / str(common))
        for _ in range(2):  # computed, and read
            found = score(
                "known",
                Known(own, common),
                case.final_model,
                data,
                plan,
                config,
                store,
                Cost("known"),
                problem,
            )
            torch.testing.assert_close(found["scores"][0, 0], torch.tensor([3.0, 3.0, 9.0]))
            # variances by hand: members' own, plus the square of the sum of what they share
            expected = torch.tensor([25.0, 4.0, 2.0]) + common * torch.tensor([4.0, 1.0, 4.0])
            torch.testing.assert_close(found["sem"][0, 0].square(), expected)
            difference = torch.tensor([2.0, 1.0, 2.0]) - 5 / 3
            expected = torch.tensor([25.0, 4.0, 2.0]) + common * difference.square()
            torch.testing.assert_close(found["sem_adjusted"][0, 0].square(), expected)
            assert withheld(found) == "half of them: a test"
            assert judged_bars(found, True) is found["sem_adjusted"]
            assert judged_bars(found, False) is found["sem"]
