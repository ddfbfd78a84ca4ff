"""What is asked of optimizers: the same of each kind, and of none what it doesn't offer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from fimo.app.scoring import applicable
from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting
from fimo.engine.optimizers import KINDS, Optimizer
from fimo.engine.replicas import Replica
from fimo.engine.settings import OPTIMIZERS
from fimo.errors import InputError
from fimo.further_training import Protocol, further_train, tangent_outputs
from fimo.methods.best import Best
from fimo.methods.exact import ExactInfluence
from fimo.models.final_model import FinalModel
from fimo.models.lightning_module import FinalModelModule
from fimo.models.losses import mean_squared_error
from tests.cases import CASES
from tests.methods.test_response import following
from tests.reference.further_training import PlainLion

CONF = Path(__file__).parents[2] / "conf"
LION = Protocol(optimizer="lion", lr=1e-3, betas=(0.9, 0.99), batch_size=5, epochs=2)


@dataclass(frozen=True, kw_only=True)
class SignDescent(Optimizer):
    """A kind that knows its state and its step alone."""

    name = "sign"

    @property
    def state(self) -> tuple[str, ...]:
        return ()

    def step_(
        self, parameters: Tensor, gradient: Tensor, state: Mapping[str, Tensor], lr: float, taken: int
    ) -> None:
        parameters.sub_(gradient.sign(), alpha=lr)

    def first_step(self, gradient: Tensor, lr: float) -> Tensor:
        return lr * gradient.sign()


def test_every_name_has_its_kind_and_is_in_the_comments_of_the_configuration() -> None:
    assert tuple(KINDS) == OPTIMIZERS
    files = [CONF / "further_training" / "default.yaml", *(CONF / "model").glob("*.yaml")]
    for file in files:
        (line,) = [line for line in file.read_text().splitlines() if line.startswith("optimizer:")]
        assert all(name in line.partition("#")[2] for name in OPTIMIZERS), file


def test_a_new_kind_is_never_taken_for_another() -> None:
    kind = SignDescent()
    assert kind.underivable
    one = torch.ones(1, 1)
    for ask in (
        lambda: kind.updated({"parameters": {}}, {}, 0.1, 1),
        lambda: kind.advance_(one, None, torch.zeros(1, dtype=torch.int64), one, 0.1, 1),
        lambda: kind.time(one),
        lambda: kind.pace(1.0),
        lambda: kind.denominator(one),
        lambda: kind.unbiased(one, 1),
        lambda: kind.mean_pace(one),
    ):
        with pytest.raises(NotImplementedError, match="no derivative of its step is known"):
            ask()


def test_methods_that_follow_further_training_say_that_lion_cannot_be_followed() -> None:
    files = sorted((CONF / "method").glob("*.yaml"))
    methods = {f.stem: instantiate(OmegaConf.load(f)[f.stem]) for f in files}
    case = CASES["mlp_regression"]()
    kept, skipped = applicable(methods, case.final_model, case.train, LION)
    others = applicable(methods, case.final_model, case.train, Protocol(optimizer="adam", epochs=1))[0]
    following = {name for name, m in others.items() if m.follows_further_training}
    assert set(others) - set(kept) == following - {"mirrored", "daunce"}  # which make steps of their own
    for name in ("response", "calibrated", "best", "source", "unrolled", "exact", "cg", "lissa"):
        assert "lion" in skipped[name], name
    assert {"graddot", "ekfac", "trak", "tracin", "datainf"} <= set(kept)
    assert ExactInfluence(damping="auto").unfollowable(LION) is None


def test_from_python_they_refuse_it_in_one_line() -> None:
    case = CASES["mlp_regression"]()
    with pytest.raises(InputError, match=r"further_training\.optimizer: Best does not apply: a step of lion"):
        Best().attribute(case.final_model, case.train, case.test, [0, 1], following(case, LION))
    with pytest.raises(InputError, match=r"further_training\.optimizer: a step of lion"):
        tangent_outputs(case.final_model, case.train, case.test, LION, 0, [0])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_final_model_is_trained_by_lion_as_published(weight_decay: float) -> None:
    torch.manual_seed(0)
    network, inputs = nn.Linear(4, 2).double(), torch.randn(20, 4).double()
    plain = nn.Linear(4, 2).double()
    plain.load_state_dict(network.state_dict())
    make = KINDS["lion"](weight_decay=weight_decay).torch_optimizer
    module = FinalModelModule(network, mean_squared_error, "regression", 2, make, lr=0.01)
    optimizers = (
        module.configure_optimizers(),
        PlainLion(list(plain.parameters()), 0.01, (0.9, 0.99), weight_decay),
    )
    for _ in range(5):
        for net, optimizer in zip((network, plain), optimizers, strict=True):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(network.weight, plain.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_is_as_long_as_is_said(name: str) -> None:
    kind = KINDS[name]()
    parameters, gradient = torch.zeros(3).double(), torch.tensor([2.0, 0.5, 0.1]).double()
    expected = kind.first_step(gradient, 0.01)
    state = {key: torch.zeros_like(parameters) for key in kind.state}
    kind.step_(parameters, gradient.clone(), state, 0.01, 1)
    torch.testing.assert_close(-parameters, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_pure_step_equals_the_one_in_place(name: str) -> None:
    kind = KINDS[name](weight_decay=0.1)
    if kind.underivable:
        pytest.skip(kind.underivable)
    generator = torch.Generator().manual_seed(0)
    at = torch.randn(4, generator=generator).double()
    state = {key: torch.zeros_like(at) for key in kind.state}
    pure = {"parameters": {"p": at.clone()}, **{key: {"p": t.clone()} for key, t in state.items()}}
    for taken in range(1, 4):
        gradient = torch.randn(4, generator=generator).double()
        pure = kind.updated(pure, {"p": gradient}, 0.05, taken)
        kind.step_(at, gradient.clone(), state, 0.05, taken)
        torch.testing.assert_close(pure["parameters"]["p"], at, rtol=1e-12, atol=1e-14)


class Experts(nn.Module):
    """Two networks, each for some instances: a batch without such an instance gives one no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)])

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 1)
        for k, expert in enumerate(self.experts):  # the last one is never used
            chosen = ((x[:, 0] > 0.8) == bool(k)) & (k < 2)
            if chosen.any():
                out = out.index_put((chosen.nonzero()[:, 0],), expert(x[chosen]))
        return out


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "lr": 0.05, "weight_decay": 0.1},
        {"optimizer": "adamw", "lr": 0.05, "weight_decay": 0.1},
        {"momentum": 0.9, "lr": 0.1},
        {"weight_decay": 0.1, "lr": 0.1},
        {"optimizer": "lion", "lr": 0.05, "weight_decay": 0.1, "betas": (0.9, 0.99)},
    ],
)
def test_a_parameter_without_a_gradient_in_a_batch_is_left_alone_as_by_torch(
    settings: dict[str, Any],
) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(14, 2).double(), torch.randn(14, 1).double()
    network, train, test = Experts().double(), Instances(x[:12], y[:12]), Instances(x[12:], y[12:])
    protocol = Protocol(batch_size=2, epochs=2, dtype="float64", leave_out="mask", **settings)
    model = FinalModel(network, "mse", accept_poor=True)
    found = further_train(model, train, test, protocol, seeds=[3], left_out=[1, 8]).raw

    def losses(left_out: int | None) -> Tensor:
        run, draws = copy.deepcopy(network), torch.Generator().manual_seed(3)
        optimizer = protocol.update_rule.torch_optimizer(run.parameters(), protocol.lr)
        points = []
        for _ in range(2):
            for batch in torch.randperm(12, generator=draws).split(2):
                optimizer.zero_grad()
                weight = torch.tensor([0.0 if i == left_out else 0.5 for i in batch.tolist()])
                ((run(x[batch]) - y[batch]).square()[:, 0] * weight).sum().backward()
                optimizer.step()
            points.append((run(x[12:]) - y[12:]).square()[:, 0].detach())
        return torch.stack(points)

    expected = torch.stack([losses(1) - losses(None), losses(8) - losses(None)], -1)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-9)


def test_steps_that_left_a_parameter_alone_are_in_a_saved_state() -> None:
    """Adam's bias correction counts a parameter's own steps."""
    torch.manual_seed(1)
    data = Instances(torch.randn(12, 2), torch.randn(12, 1))
    protocol = Protocol(optimizer="adam", lr=0.05, batch_size=2, epochs=3)
    setting = Setting.build(FinalModel(Experts(), "mse", accept_poor=True), data, data, protocol)
    replicas = [Replica(3), Replica(3, (1,))]
    whole, first, second = (Chunk(setting, replicas) for _ in range(3))
    whole.advance(15)
    first.advance(7)
    assert first.optimizer.skipped
    second.advance(3)
    second.restore(first.state(), 7)
    second.advance(15)
    for name, state in whole.state().items():
        assert torch.equal(state, second.state()[name]), name
