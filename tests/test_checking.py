"""A check of one's own model: what is sound passes, and what is broken fails in words that say where."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fimo
from fimo.checking import check as story
from fimo.checking import durations, model_checks, run_checks
from fimo.checking.constant import constant
from fimo.checking.loss_checks import losses
from fimo.checking.partial import partial_effects
from fimo.checking.problem import Clock, Problem, effects
from fimo.checking.verdict import Check, Line, Verdict
from fimo.data.instances import Instances
from fimo.engine.pace import Pace
from fimo.errors import CheckFailedError
from fimo.evaluation.ceiling import seeds_for
from fimo.further_training import Protocol
from fimo.further_training.resolution import remedy
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.exact import ExactInfluence
from fimo.methods.graddot import GradDot
from fimo.methods.response import Response
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy, mean_squared_error
from fimo.scores import Scores
from fimo.validation.poor import Comparison, compared
from tests.cases import CASES, Case, mlp

PROTOCOL = Protocol(lr=0.01, batch_size=5, epochs=2)
PACE = Pace(1e-4, 1e-4)
SOON = 2.0


def problem(case: Case, protocol: Protocol = PROTOCOL, **more: object) -> Problem:
    data = (case.final_model, case.train, case.test)
    units = [(i,) for i in range(0, len(case.train), 3)]
    return Problem(*data, protocol, [0, 1, 2], units, **more)  # type: ignore[arg-type]


def with_network(name: str, network: nn.Module, loss: object = None) -> Case:
    """Return a case of float32 with another network (or loss) that its data fit."""
    case = CASES[name]().to(torch.float32)
    return dataclasses.replace(
        case,
        final_model=FinalModel(network, loss or case.final_model.loss),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def sound() -> Check:
    case = CASES["mlp_regression"]().to(torch.float32)
    data = (case.final_model, case.train, case.test)
    return fimo.check(*data, PROTOCOL, 3, 6, methods={"graddot": GradDot()}, seconds=12.0)


def test_a_sound_model_passes_every_part(sound: Check) -> None:
    names = [line.name for line in sound]
    assert names == [
        "loss", "constant predictor", "gradients", "parameters", "sign", "determinism", "rounding",
        "linearity", "seeds", "time: gold standard", "time: graddot",
    ]  # fmt: skip
    assert sound.passed
    assert sound.seconds < 60
    for name in ("loss", "gradients", "parameters", "sign", "determinism", "rounding"):
        assert sound[name].verdict == Verdict.PASS, str(sound)
    assert sound["gradients"].value < 1e-6
    assert sound["sign"].value > 0.9999
    assert sound["determinism"].value == 0


def test_a_check_is_a_table_a_frame_and_a_file(sound: Check, tmp_path: Path) -> None:
    assert "pass  gradients" in str(sound)
    assert list(sound.to_frame().columns) == ["verdict", "name", "text", "value"]
    sound.save(tmp_path / "check.json")
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["passed"] is True
    assert [line["name"] for line in written["lines"]] == [line.name for line in sound]
    with pytest.raises(dataclasses.FrozenInstanceError):
        sound.lines = ()  # type: ignore[misc]
    failed = Check((Line("a", Verdict.PASS, "x"), Line("b", Verdict.FAIL, "y")))
    assert not failed.passed
    assert Check((Line("a", Verdict.WARN, "x"),)).passed


def test_nothing_of_the_users_model_changes() -> None:
    case = CASES["conv_net"]().to(torch.float32)
    network = case.final_model.network
    before = {n: t.clone() for n, t in network.state_dict().items()}
    state = torch.get_rng_state()
    fimo.check(case.final_model, case.train, case.test, PROTOCOL, 2, 3, seconds=3.0)
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    assert not network.training
    assert torch.equal(state, torch.get_rng_state())


def test_importing_the_package_imports_no_torch() -> None:
    code = "import fimo, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# broken models


def mean_over_the_batch(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def test_a_loss_averaged_over_the_batch_fails_and_the_rest_is_not_tried() -> None:
    case = with_network("mlp_regression", mlp(4, (6,), 1, nn.Tanh), mean_over_the_batch)
    found = fimo.check(case.final_model, case.train, case.test, PROTOCOL, 2, 3, seconds=5.0)
    assert not found.passed
    assert found.lines[0].verdict == Verdict.FAIL
    assert [line.name for line in found] == ["loss", "the rest"]


def test_probabilities_where_cross_entropy_takes_logits_are_warned_of() -> None:
    logits = mlp(4, (6,), 3, nn.ReLU)
    for last, verdict in ((nn.Softmax(1), Verdict.WARN), (nn.LogSoftmax(1), Verdict.PASS)):
        case = with_network("mlp_classification", nn.Sequential(logits, last))
        line, *_ = losses(case.final_model, case.train, case.test)
        assert line.verdict == verdict
        assert line.text.startswith("outputs look like probabilities") == (verdict == Verdict.WARN)


def test_a_network_that_couples_the_rows_of_a_batch_fails() -> None:
    coupled = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 1)
    )
    case = with_network("mlp_regression", coupled)
    found = fimo.check(case.final_model, case.train, case.test, PROTOCOL, 2, 3, seconds=5.0)
    assert found.lines[0].verdict == Verdict.FAIL


class Drawing(nn.Module):
    """Adds noise from a generator that no seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(4, (6,), 1, nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + 1e-3 * np.random.default_rng().standard_normal())


def test_random_numbers_that_no_seed_controls_fail() -> None:
    case = with_network("mlp_regression", Drawing())
    first, *_ = losses(case.final_model, case.train, case.test)
    assert first.verdict == Verdict.FAIL
    assert "random numbers" in first.text
    line = run_checks.determinism(problem(case), PACE, Clock.of(SOON))
    assert line.verdict == Verdict.FAIL
    assert "draw" in line.text
    assert model_checks.gradients(problem(case), Clock.of(SOON)).verdict == Verdict.FAIL


def test_a_model_worse_than_a_constant_fails_unless_that_is_meant() -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    assert constant(problem(case), Clock.of(SOON)).verdict == Verdict.PASS
    wrong = mlp(4, (6, 5), 1, nn.Tanh)
    wrong.load_state_dict(case.final_model.network.state_dict())
    wrong[-1].bias.data += 10  # type: ignore[union-attr,operator]
    shifted = dataclasses.replace(case, final_model=FinalModel(wrong, mean_squared_error))
    line = constant(problem(shifted), Clock.of(SOON))
    assert line.verdict == Verdict.FAIL
    assert line.value > 1
    meant = FinalModel(wrong, mean_squared_error, accept_poor=True)
    accepted = constant(problem(dataclasses.replace(case, final_model=meant)), Clock.of(SOON))
    assert accepted.verdict == Verdict.WARN


def test_a_model_worse_than_a_constant_on_test_instances_alone_is_warned_of() -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    turned = dataclasses.replace(case, test=Instances(case.test.inputs, -case.test.targets))
    assert constant(problem(turned), Clock.of(SOON)).verdict == Verdict.WARN


@pytest.mark.parametrize("name", ["mlp_regression", "mlp_classification"])
def test_the_best_constant_is_the_mean_or_the_classes_shares(name: str) -> None:
    case = CASES[name]()
    compare = compared(case.final_model, case.train, case.test)
    assert isinstance(compare, Comparison)
    found = compare.constant_test
    if name == "mlp_regression":
        expected = mean_squared_error(
            case.train.targets.mean(0).expand(len(case.test), -1), case.test.targets
        )
    else:
        shares = torch.bincount(case.train.targets, minlength=3).double() / len(case.train)
        expected = cross_entropy(shares.log().expand(len(case.test), -1), case.test.targets)
    torch.testing.assert_close(found, expected)


def test_under_a_loss_of_ones_own_a_poor_model_fails_and_one_that_cannot_be_told_is_warned_of() -> None:
    case = CASES["mlp_regression"]()

    def narrow(outputs: Tensor, targets: Tensor) -> Tensor:
        """A log density, below zero where errors are small."""
        return ((outputs - targets).square() / 0.02 - 4).mean(1)

    def without_constants(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) > 4 and (outputs == outputs[:1]).all():
            raise ValueError("no variance")
        return (outputs - targets).abs().mean(1)

    right = FinalModel(case.final_model.network, narrow)
    fitted = Instances(case.train.inputs, right.outputs(case.train))
    for targets, verdict in ((fitted.targets, Verdict.PASS), (fitted.targets + 30, Verdict.FAIL)):
        data = Instances(case.train.inputs, targets)
        own = dataclasses.replace(case, final_model=right, train=data, test=data)
        assert constant(problem(own), Clock.of(SOON)).verdict == verdict
    untold = dataclasses.replace(case, final_model=FinalModel(right.network, without_constants))
    line = constant(problem(untold), Clock.of(SOON))
    assert line.verdict == Verdict.WARN
    assert "can't be told: the loss of constant outputs fails: no variance" in line.text


def test_a_saturated_model_whose_effects_float32_does_not_resolve_fails() -> None:
    case = CASES["mlp_classification"]().to(torch.float32)
    inputs, targets = case.train.inputs, case.train.targets
    network = mlp(4, (6, 5), 3, nn.ReLU)
    network.load_state_dict(case.final_model.network.state_dict())
    tiny = Protocol(lr=1e-8, batch_size=5, epochs=2)
    saturated = dataclasses.replace(
        case, final_model=FinalModel(network, cross_entropy), train=Instances(inputs, targets)
    )
    line = run_checks.rounding(problem(saturated, tiny), PACE, Clock.of(SOON))
    assert line.verdict == Verdict.FAIL
    assert "further_training.dtype=float64" in line.text
    assert (
        run_checks.rounding(problem(saturated, tiny.in_float64()), PACE, Clock.of(SOON)).verdict
        == Verdict.PASS
    )


def test_passes_in_lower_precision_are_named_with_how_far_off_they_are() -> None:
    case = CASES["mlp_classification"]().to(torch.float32)
    lines = [
        run_checks.rounding(
            problem(case, Protocol(lr=0.1, epochs=2, autocast=autocast)), PACE, Clock.of(SOON)
        )
        for autocast in ("bfloat16", None)
    ]
    assert lines[0].value > 50 * lines[1].value
    assert "; bfloat16 is off by" in lines[0].text
    assert "(foretold of float32: " in lines[0].text
    assert remedy(Protocol(epochs=2, autocast="bfloat16")) == "further_training.autocast=null"
    assert "; float32 is off by" in lines[1].text


def test_effects_that_are_exactly_zero_are_said_to_be_and_pass_nowhere() -> None:
    network = mlp(4, (6,), 3, nn.ReLU)
    network[-1].weight.data.mul_(0)  # type: ignore[union-attr,operator]
    network[-1].bias.data.copy_(torch.tensor([1e4, 0.0, 0.0]))  # type: ignore[union-attr]
    case = with_network("mlp_classification", network)
    sure = Instances(case.train.inputs, torch.zeros_like(case.train.targets))
    whole = problem(dataclasses.replace(case, train=sure))
    lines = [part(whole, PACE, Clock.of(SOON)) for part in (run_checks.sign, run_checks.rounding)]
    assert [line.verdict for line in lines] == [Verdict.FAIL, Verdict.FAIL]
    lines = [part(whole, PACE, Clock.of(SOON)) for part in (run_checks.linearity, run_checks.reliability)]
    assert [line.verdict for line in lines] == [Verdict.WARN, Verdict.WARN]
    assert all("nan" not in line.text for line in lines)


def test_parameters_that_nothing_reaches_are_named() -> None:
    network = nn.Sequential()
    network.add_module("layer", nn.Linear(4, 6))
    network.add_module("dead", nn.ReLU())
    network.add_module("head", nn.Linear(6, 1))
    network.layer.weight.data.zero_()  # type: ignore[union-attr,operator]
    network.layer.bias.data.fill_(-1.0)  # type: ignore[union-attr,operator]
    line = model_checks.parameters(problem(with_network("mlp_regression", network)), Clock.of(SOON))
    assert line.verdict == Verdict.WARN
    assert "layer.weight, layer.bias, head.weight" in line.text
    assert line.value == pytest.approx(1 / 37)
    frozen = FinalModel(network, mean_squared_error, trainable=("layer*",))
    case = dataclasses.replace(with_network("mlp_regression", network), final_model=frozen)
    assert model_checks.parameters(problem(case), Clock.of(SOON)).verdict == Verdict.FAIL


class Detaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).detach() + 0 * self.layer(x))


def test_a_gradient_that_is_not_the_losss_own_fails() -> None:
    case = with_network("mlp_regression", Detaching())
    assert model_checks.gradients(problem(case), Clock.of(SOON)).verdict == Verdict.FAIL


def test_a_part_that_raises_is_a_line_with_the_reason() -> None:
    def broken() -> Line:
        raise ValueError("no such thing\nsecond line")

    at = broken.__code__.co_firstlineno + 1
    line = story._tried("part", broken)
    assert line == Line("part", Verdict.FAIL, f"no such thing ({Path(__file__).name}, line {at})", line.value)


# what the lines are made of


@pytest.mark.parametrize("leave_out", ["shift", "mask", "every_batch", "reweighted"])
@pytest.mark.parametrize("name", ["mlp_regression", "conv_net"])
def test_removing_the_whole_of_an_instance_is_leaving_it_out(name: str, leave_out: str) -> None:
    case = CASES[name]()
    protocol = dataclasses.replace(PROTOCOL, leave_out=leave_out).in_float64()  # type: ignore[arg-type]
    whole = problem(case, protocol)
    setting, units, clock = whole.setting, whole.early(3), Clock.of(60)
    *_, (step, found) = partial_effects(setting, 0, units, whole.total_steps, clock)
    expected, taken = effects(setting, 0, units, whole.total_steps, clock)
    assert step == taken
    assert torch.allclose(found[0], expected, rtol=1e-9, atol=1e-13)


def test_effects_are_linear_in_the_weight_for_small_steps_and_their_share_is_counted() -> None:
    case = CASES["mlp_regression"]()
    small = problem(case, Protocol(lr=1e-6, batch_size=5, epochs=1, leave_out="mask").in_float64())
    *_, (_, found) = partial_effects(small.setting, 0, small.early(3), small.total_steps, Clock.of(60))
    assert torch.allclose(found[0], 2 * found[1], rtol=1e-4)
    assert torch.allclose(found[0], 4 * found[2], rtol=1e-4)
    assert run_checks.linear_share(found) == 1
    assert run_checks.derivative_agreement(found) == pytest.approx(1)
    full = torch.tensor([[1.0, 1.0]])
    assert run_checks.linear_share(torch.stack([full, full / 2, torch.tensor([[0.25, 0.1]])])) == 0.5
    assert math.isnan(run_checks.linear_share(torch.zeros(3, 2, 2)))


def test_a_quadratic_effects_derivative_is_extrapolated_exactly() -> None:
    weight = torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    slope, bend = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    found = slope * weight + bend * weight**2
    expected = torch.nn.functional.cosine_similarity(found[0].flatten(), slope.flatten(), dim=0)
    assert run_checks.derivative_agreement(found) == pytest.approx(float(expected), abs=1e-5)


def test_the_seeds_for_a_ceiling_are_those_that_reach_it() -> None:
    reached, tried = 0.7, 4
    wanted = seeds_for(reached, tried, 0.9)
    assert wanted is not None
    assert (
        run_checks.ceiling_of(reached, tried, wanted)
        >= 0.9
        > run_checks.ceiling_of(reached, tried, wanted - 1)
    )
    assert run_checks.ceiling_of(reached, tried, tried) == pytest.approx(reached)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_times_are_extrapolated_by_the_growth_that_was_seen(power: float) -> None:
    shares = [0.1, 0.2]
    timings = [durations.Timing(s, 3 * s**power) for s in shares]
    assert durations.extrapolated(timings) == pytest.approx(3.0)
    affine = [durations.Timing(s, 1 + 2 * s) for s in shares]
    assert durations.extrapolated(affine) == pytest.approx(3.0)
    assert durations.extrapolated([*timings, durations.Timing(1.0, 7.0)]) == 7.0


def test_methods_are_timed_and_one_that_fails_says_so() -> None:
    case = CASES["mlp_classification"]().to(torch.float32)

    class Failing(GradDot):
        def scores(self, problem: AttributionProblem) -> Scores:
            raise RuntimeError("out of luck")

    methods = {"exact": ExactInfluence(), "response": Response(), "failing": Failing()}
    lines = durations.methods(problem(case, methods=methods), PACE, 1.0, Clock.of(6.0))
    assert [line.name for line in lines] == ["time: exact", "time: response", "time: failing"]
    assert "measured" in lines[0].text
    assert lines[2].verdict == Verdict.WARN
    assert "out of luck" in lines[2].text
    hurried = durations.method_line(problem(case), "graddot", GradDot(), PACE, 0.0, 1e-9)
    assert "at most" in hurried.text  # one size does not tell what is constant from what grows
    assert hurried.verdict == Verdict.PASS
    late = durations.methods(problem(case, methods=methods), PACE, 1.0, Clock.of(-1.0))
    assert "exact, response, failing" in late[0].text


def test_a_slow_followers_full_runs_are_its_least_time() -> None:
    case = CASES["mlp_classification"]().to(torch.float32)
    slow = Pace(100.0, 1.0)
    (line,) = durations.methods(problem(case, methods={"response": Response()}), slow, 1e9, Clock.of(1.0))
    assert line.value == pytest.approx(3 * 10 * 100)
    assert "at least" in line.text


@pytest.fixture
def composed(tmp_path: Path) -> list[str]:
    return [
        "until=check", "dataset=diabetes", "trainer.max_epochs=3", "model.network.hidden=[8]",
        "+method=graddot", "further_training.epochs=1", "trainer.enable_progress_bar=false",
        f"store={tmp_path}/store", f"hydra.run.dir={tmp_path}/run",
    ]  # fmt: skip


def test_a_run_until_check_writes_the_check_and_its_exit_status_is_the_verdict(
    composed: list[str], tmp_path: Path
) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "src.run", *composed], cwd=root, capture_output=True, text=True
    )
    written = json.loads((tmp_path / "run" / "check.json").read_text())
    assert done.returncode == (0 if written["passed"] else 1), done.stderr
    assert "time: gold standard" in done.stdout
    assert not (tmp_path / "run" / "sensitivity.safetensors").exists()


def test_a_failed_check_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fimo.app import check_run
    from fimo.app.plan import Plan
    from fimo.data.datamodule import InstancesModule

    failed = Check((Line("loss", Verdict.FAIL, "x"),), 1.0)
    monkeypatch.setattr(check_run, "check", lambda *a, **k: failed)
    case = CASES["mlp_regression"]()

    class Data(InstancesModule):
        def load(self) -> None: ...

        def display(self, split: object, index: int) -> object: ...  # type: ignore[override]

    data = Data("d", 4)
    data.train, data.test = case.train, case.test
    plan = Plan(PROTOCOL, [0, 1], [2, 3], [0, 1], [0, 1], True, "auto")
    with pytest.raises(CheckFailedError, match="loss"):
        check_run.check_run(case.final_model, data, plan, {}, torch.device("cpu"), tmp_path)
    assert json.loads((tmp_path / "check.json").read_text())["passed"] is False
