"""Further training that diverges ends in one line wherever it is asked for, and in no verdicts or scores."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fimo
from fimo.errors import InputError


def case() -> tuple[fimo.FinalModel, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(30, 3)
    y = x.sum(1, keepdim=True)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return fimo.FinalModel(network, "mse", accept_poor=True), (x[:24], y[:24]), (x[24:], y[24:])


DIVERGING = fimo.Protocol(lr=1e30, batch_size=8, epochs=2)


def test_the_gold_standard_says_that_all_runs_diverged() -> None:
    with pytest.raises(InputError, match=r"^further_training\.lr: all runs diverged"):
        fimo.further_train(*case(), DIVERGING, seeds=2, left_out=3)


@pytest.mark.parametrize("verify", [False, True])
def test_an_audit_gives_no_verdicts_on_runs_that_diverge(verify: bool) -> None:
    with pytest.raises(InputError, match=r"^further_training\.lr: the full runs diverge"):
        fimo.audit(*case(), DIVERGING, top=2, seeds=3, verify=verify)


@pytest.mark.parametrize("method", ["best", "response", "source", "unrolled", "mirrored"])
def test_methods_that_follow_runs_which_diverge_give_no_scores(method: str) -> None:
    with pytest.raises(InputError, match=r"^further_training\.lr: .* diverge"):
        fimo.attribute(*case(), method, further_training=DIVERGING, left_out=8, seeds=2)


def test_methods_that_follow_none_are_not_concerned() -> None:
    assert fimo.attribute(*case(), "graddot", further_training=DIVERGING).values.isfinite().all()
