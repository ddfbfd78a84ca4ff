"""Error bars of scores: how often they hold the truth, when they are withheld, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fimo.engine.protocol import Protocol
from fimo.further_training import further_train
from fimo.linear_response.linearity import Discrepancy
from fimo.methods.best import Best
from fimo.methods.calibrated import CalibratedResponse, after_runs
from fimo.methods.error_bars import SeedSpread, error_bars
from fimo.methods.following import FollowingMethod
from fimo.methods.response import Response
from fimo.methods.unrolled import Unrolled
from fimo.scores import Scores
from tests.cases import CASES, Case
from tests.methods.test_response import following, linear_regression

LEFT_OUT = list(range(0, 22, 2))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_spread_over_seeds_covers_their_expectation_as_often_as_it_says(seeds: int) -> None:
    generator = torch.Generator().manual_seed(seeds)
    shares = []
    for _ in range(60):
        column, row = (
            torch.randn(*n, generator=generator, dtype=torch.float64).exp() for n in ((20,), (8, 1))
        )
        sizes = row * column
        common = torch.randn(seeds, 1, 8, 1, generator=generator, dtype=torch.float64)
        spread = SeedSpread()
        for s in range(seeds):
            own = sizes * torch.randn(1, 8, 20, generator=generator, dtype=torch.float64)
            spread.add(own + 0.5 * row * common[s])
        raw, adjusted = spread.variances()
        centred = spread.mean - spread.mean.mean(-1, keepdim=True)
        for error, variance in ((spread.mean, raw), (centred, adjusted)):
            z = error.abs() / variance.sqrt()
            shares.append([float((z <= k).double().mean()) for k in (1, 2)])
    one, two = torch.tensor(shares).view(60, 2, 2).mean(0).T
    assert ((one - 0.68).abs() < 0.08).all(), one
    assert ((two - 0.95).abs() < 0.04).all(), two


def test_the_mean_over_seeds_is_theirs() -> None:
    scores = torch.randn(5, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = SeedSpread()
    for x in scores:
        spread.add(x)
    torch.testing.assert_close(spread.mean, scores.mean(0))
    # the prior leaves the mean over instances of the variance as it is, up to Student's factor
    raw, adjusted = spread.variances()
    for found, each in ((raw, scores), (adjusted, scores - scores.mean(-1, keepdim=True))):
        ratio = found.mean(-1) / (each.var(0) / 5).mean(-1)
        assert (ratio.mean(-1) > 1.05).all()
        assert (ratio.mean(-1) < 1.45).all()


def attributed(method: FollowingMethod, case: Case, protocol: Protocol, seeds: Any) -> Scores:
    run = (case.final_model, case.train, case.test, torch.tensor(LEFT_OUT), following(case, protocol, seeds))
    return method.attribute(*run)


def test_on_a_linear_model_nothing_is_missed_and_bars_are_the_seeds_spread() -> None:
    case = linear_regression()
    protocol = Protocol(lr=0.05, batch_size=11, epochs=2, dtype="float64", evaluate_every=1)
    scores = []
    for seed in range(4):
        scores.append(attributed(Response(kernels="own", checks=0), case, protocol, [seed]).values)
    found = attributed(Response(kernels="own"), case, protocol, range(4))
    spread = SeedSpread()
    for one in scores:
        spread.add(one)
    raw, adjusted = spread.variances()
    torch.testing.assert_close(found.sem, raw.sqrt(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.sem_adjusted, adjusted.sqrt(), rtol=1e-4, atol=1e-9)


def test_on_a_linear_model_calibrated_misses_nothing_in_any_group_of_seeds() -> None:
    """Losses of different seeds differ by far more than effects: only what they change by is compared."""
    case = linear_regression()
    protocol = Protocol(lr=0.05, batch_size=4, epochs=2, dtype="float64")
    left_out, seeds = torch.arange(22), range(6)
    run = (case.final_model, case.train, case.test, left_out, following(case, protocol, seeds))
    method = CalibratedResponse(budget=0.9, kernels="own", removal="own")  # which follows all seeds
    scores = method.attribute(*run)
    spread = SeedSpread()
    for seed in seeds:
        one = (*run[:4], following(case, protocol, [seed]))
        spread.add(Response(kernels="own", checks=0, removal="own").attribute(*one).values)
    for found, variance in zip((scores.sem, scores.sem_adjusted), spread.variances(), strict=True):
        assert found is not None
        ratio = found / variance.sqrt()
        assert ratio.median() == pytest.approx(1, abs=0.02)


@pytest.fixture(scope="module")
def beyond_linear() -> tuple[Case, Protocol, Tensor]:
    """A small network, its further training far beyond linear, and the raw changes of 40 seeds."""
    case = CASES["mlp_regression"]()
    protocol = Protocol(lr=0.1, batch_size=11, epochs=40, leave_out="mask", dtype="float64")
    truth = further_train(
        case.final_model, case.train, case.test, protocol, range(100, 140), LEFT_OUT,
        trainer={"enable_progress_bar": False},
    )  # fmt: skip
    return case, protocol, truth.raw.double()


@pytest.mark.parametrize("make", [Response, CalibratedResponse, lambda: Unrolled(seeds=None)])
def test_bars_hold_the_effects_of_other_seeds(
    make: Any, beyond_linear: tuple[Case, Protocol, Tensor]
) -> None:
    case, protocol, truth = beyond_linear
    shares, spread_alone = [], []
    for k in range(4 if make in (Response, CalibratedResponse) else 1):  # unrolled takes long
        found = attributed(make(), case, protocol, range(6 * k, 6 * k + 6))
        scores = found.values
        for adjusted, sem in ((False, found.sem), (True, found.sem_adjusted)):
            assert sem is not None
            wanted = truth - truth.mean(-1, keepdim=True) if adjusted else truth
            error = (scores - scores.mean(-1, keepdim=True) if adjusted else scores) - wanted.mean(0)
            z = error.abs() / (sem.square() + wanted.var(0) / 40).sqrt()
            known = z[4:][~z[4:].isnan()]  # others are withheld
            if adjusted:
                assert len(known) > 0.5 * z[4:].numel()
            if len(known):
                shares.append([float((known <= bound).double().mean()) for bound in (1, 2)])
        plain = Response(checks=0)
        each = torch.stack([attributed(plain, case, protocol, [s]).values for s in range(6 * k, 6 * k + 6)])
        z = (each.mean(0) - truth.mean(0)).abs() / (each.var(0) / 6 + truth.var(0) / 40).sqrt()
        spread_alone.append(float((z[4:] <= 2).double().mean()))
    one, two = torch.tensor(shares).mean(0).tolist()
    assert 0.55 < one < 0.85
    assert two > 0.88
    if make is Response:
        assert sum(spread_alone) / len(spread_alone) < two - 0.05  # what the spread over seeds alone holds


@pytest.mark.parametrize(
    ("method", "seeds", "reason"),
    [
        (Response(checks=0), [0, 1], "checks: 0"),
        (Response(checks=6), [0, 1], "fewer than 4 instances"),
        (Response(), [3], "a single followed seed"),
        (Response(along="final", checks=0), [0, 1], "checks: 0"),
        (Unrolled(seeds=None, checks=0), [0, 1], "checks: 0"),
        (Unrolled(seeds=1), [0, 1], "a single followed seed"),
        (CalibratedResponse(budget=0, checks=0), [0, 1], "checks: 0"),
        (Best(checks=0), [0, 1], "checks: 0"),
    ],
)
def test_bars_are_withheld_with_the_reason_where_a_part_of_the_error_is_unknown(
    method: Any, seeds: list[int], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    protocol = Protocol(lr=0.02, batch_size=11, epochs=1, dtype="float64")
    found = attributed(method, CASES["mlp_regression"](), protocol, seeds)
    assert found.sem is None
    assert found.sem_adjusted is None
    assert reason in found.withheld
    assert reason in caplog.text


@pytest.mark.parametrize(
    "make", [lambda: Response(along="final"), lambda: Response(along="end"), lambda: Response(form="ekfac")]
)
def test_every_form_of_the_response_has_bars(make: Any) -> None:
    protocol = Protocol(lr=0.02, batch_size=11, epochs=2, dtype="float64")
    found = attributed(make(), CASES["mlp_regression"](), protocol, range(6))
    for sem in (found.sem, found.sem_adjusted):
        assert sem is not None
        assert sem.shape == found.values.shape
        assert (sem[sem.isfinite()] > 0).all()
    # eleven instances are two groups, which don't show what all instances share: raw bars may be withheld
    assert found.sem_adjusted is not None
    assert found.sem_adjusted.isfinite().double().mean() > 0.5


def test_a_part_that_is_not_known_is_none_and_the_reason_says_how_much() -> None:
    own = torch.ones(2, 3, 4)
    own[1] = torch.nan
    bars = error_bars(None, Discrepancy(own, torch.zeros(2, 3, 1)), 8, torch.float32)
    assert bars.raw is not None
    assert bars.raw[1].isnan().all()
    assert bars.raw[0].isfinite().all()
    assert "50 %" in bars.withheld


def test_a_bar_that_is_mostly_doubt_is_withheld_and_the_reason_says_why() -> None:
    own, common, none = torch.ones(1, 3, 4), torch.full((1, 3, 1), 0.5), torch.zeros(1, 3, 1)
    doubt = torch.zeros(1, 3, 4)
    doubt[:, 0] = 0.9  # of a variance of about 1
    spread = (torch.full_like(own, 0.1), torch.full_like(own, 0.1))
    bars = error_bars(spread, Discrepancy(own, common, doubt=doubt, common_doubt=none), 16, torch.float32)
    assert bars.raw is not None
    assert bars.adjusted is not None
    assert bars.adjusted[:, 0].isnan().all()
    assert bars.adjusted[:, 1:].isfinite().all()
    assert bars.raw[:, 1:].isfinite().all()
    assert "noise of single" in bars.withheld
    # what all instances share matters to raw bars alone
    bars = error_bars(
        spread, Discrepancy(own, common, doubt=0 * own, common_doubt=none + 2), 16, torch.float32
    )
    assert bars.raw is not None
    assert bars.adjusted is not None
    assert bars.raw.isnan().all()
    assert bars.adjusted.isfinite().all()
    # a doubt that seeds' spread outweighs is none
    wide = (torch.full_like(own, 9.0), torch.full_like(own, 9.0))
    assert not error_bars(
        wide, Discrepancy(own, common, doubt=doubt, common_doubt=none), 16, torch.float32
    ).withheld


def test_the_cost_is_that_of_full_runs_kernels_and_real_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the engine: every instance of every batch that a run takes a gradient of."""
    from fimo.curvature.gradients import InstanceGradients
    from fimo.methods import following as module

    case = CASES["mlp_regression"]()
    protocol = Protocol(lr=0.05, batch_size=11, epochs=12, leave_out="mask", dtype="float64")
    seeds, per_run = range(4), 12 * len(case.train)
    real: list[int] = []
    jacobians: list[Any] = []
    make, init = module.run_without, InstanceGradients.__init__

    def counted(*arguments: Any) -> Tensor:
        real.append(len(arguments[-1]))
        return make(*arguments)

    def noted(self: Any, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        jacobians.append(self)

    monkeypatch.setattr(module, "run_without", counted)
    monkeypatch.setattr(InstanceGradients, "__init__", noted)
    # all seeds are followed, and two by who spends a third of the budget on them
    followed = {Response(): 4, CalibratedResponse(budget=0.9): 2, Best(short=0, budget=0.9): 2}
    for method, full in followed.items():
        real.clear()
        jacobians.clear()
        found = attributed(method, case, protocol, seeds)
        evaluated = sum(g.evaluations for g in jacobians)
        assert sum(real) >= 16
        assert evaluated > 0
        assert found.gradient_evaluations == (full + sum(real)) * per_run + evaluated


@pytest.mark.parametrize("even", [True, False])
def test_runs_leave_the_error_of_their_weighted_mean(even: bool) -> None:
    """Remainders of weighted mean zero over the run ones: simulated, with one instance of larger errors."""
    own = torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).expand(1, 1, -1).double()
    unexplained = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]).double()
    weight = torch.ones(8).double() if even else 1 / own[0, 0]
    missed = after_runs(Discrepancy(own, torch.zeros(1, 1, 1)), unexplained, weight)
    generator = torch.Generator().manual_seed(0)
    error = own[0, 0].sqrt() * torch.randn(20000, 8, generator=generator, dtype=torch.float64)
    left = error.clone()
    mean = (error[:, :4] * weight[:4]).sum(1, keepdim=True) / weight[:4].sum()
    left[:, :4] = mean  # what the runs say but for their mean is taken out
    adjusted = left - left.mean(1, keepdim=True)
    torch.testing.assert_close(missed.raw()[0, 0], left.square().mean(0), rtol=0.05, atol=0.0)
    torch.testing.assert_close(missed.adjusted()[0, 0], adjusted.square().mean(0), rtol=0.05, atol=0.0)
