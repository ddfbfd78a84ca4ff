"""Losses and predictions that are measured in the same runs, against networks trained by a plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fimo.cost import Cost
from fimo.data.instances import Instances
from fimo.engine.context import Setting
from fimo.errors import InputError
from fimo.further_training import Protocol, further_train
from fimo.methods.catalogue import method_of
from fimo.models.final_model import FinalModel
from fimo.models.quantities import CLASS, CORRECT, MEASUREMENT, joined, measuring, predicted
from fimo.store.files import Store
from fimo.validation.admission import admit
from tests.cases import CASES, Case, mlp
from tests.reference.further_training import plain_run

PROTOCOL = Protocol(lr=0.05, batch_size=5, epochs=2, dtype="float64")
UNITS = [(0,), (7,), (4, 9)]


class Unvectorised(nn.Module):
    """What torch.func can't vectorise: it looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        return outputs if float(outputs.detach().sum()) > 0 else 1.0 * outputs


def unvectorised() -> Case:
    case = CASES["mlp_classification"]()
    torch.manual_seed(0)
    return Case("loop", FinalModel(Unvectorised().double(), "cross_entropy"), case.train, case.test)


def networks(case: Case, seed: int, unit: tuple[int, ...] = ()) -> nn.Module:
    return plain_run(case.final_model, case.train, case.test, PROTOCOL, seed, unit)[2].eval()


@pytest.mark.parametrize("name", [*CASES, "loop"])
def test_predictions_change_as_in_a_plain_loop_beside_the_same_losses(name: str) -> None:
    case = unvectorised() if name == "loop" else CASES[name]()
    named = case.test[[1, 2]]
    classes = not case.test.targets.is_floating_point()
    which = [2, 0] if classes else [0, 0]
    parts = [
        (case.test, MEASUREMENT),
        (named, which),
        *([(case.test, k) for k in (CORRECT, CLASS) if classes]),
    ]
    model, test = measuring(case.final_model, parts)
    found = further_train(model, case.train, test, PROTOCOL, 2, UNITS, chunk=2)
    plain = further_train(case.final_model, case.train, case.test, PROTOCOL, 2, UNITS, chunk=2)
    j = len(case.test)
    torch.testing.assert_close(found.full_losses[..., :j], plain.full_losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.raw[:, :, :j], plain.raw, rtol=1e-6, atol=1e-12)

    def shown(network: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            outputs = network(case.test.inputs)
        if not classes:
            return outputs[[1, 2], 0], torch.empty(0)
        odds = outputs.exp()
        chances = odds / odds.sum(1, keepdim=True)
        best = outputs.argmax(1)
        return chances[[1, 2], which], torch.cat([best == case.test.targets, best]).double()

    for s in range(2):
        full, right = shown(networks(case, s))
        torch.testing.assert_close(found.full_losses[s, -1, j:], torch.cat([full, right]))
        for k, unit in enumerate(UNITS):
            without, right_without = shown(networks(case, s, unit))
            change = torch.cat([without - full, right_without - right]).float()
            torch.testing.assert_close(found.raw[s, -1, j:, k], change, rtol=1e-5, atol=1e-9)
            assert found.raw[s, -1, j : j + 2, k].abs().min() > 0


def test_replicas_are_advanced_together_as_ever() -> None:
    case = CASES["conv_net"]()
    model, test = measuring(case.final_model, [(case.test, MEASUREMENT), (case.test, 1)])
    assert Setting.build(model, case.train, test, PROTOCOL).engine == "functional"


def test_a_binary_networks_prediction_is_the_probability_of_its_label() -> None:
    torch.manual_seed(1)
    network = mlp(3, (5,), 1, nn.Tanh)
    x, y = torch.randn(30, 3), torch.randint(2, (30,)).float()
    model = FinalModel(network, "binary_cross_entropy", accept_poor=True)
    train, test = admit(model, Instances(x[:25], y[:25]), Instances(x[25:], y[25:]))
    link, shown = predicted(model, test)
    assert link == "sigmoid"
    torch.testing.assert_close(shown[:, 0], 1 / (1 + (-network(x[25:])[:, 0].detach()).exp()))
    both, instances = measuring(model, [(test, MEASUREMENT), (test, 0)])
    found = further_train(both, train, instances, Protocol(lr=0.1, batch_size=5, epochs=1), 1, 3)
    p = found.full_losses[0, 0, 5:]
    expected = -(test.targets[:, 0] * p.log() + (1 - test.targets[:, 0]) * (1 - p).log())
    torch.testing.assert_close(found.full_losses[0, 0, :5], expected)


def test_a_methods_scores_of_predictions_are_made_of_their_gradients() -> None:
    case = CASES["mlp_regression"]()
    model, test = measuring(case.final_model, [(case.test, 0)])
    found = method_of("graddot", {})[1].attribute(model, case.train, test, None, None).values
    network, (x, y) = case.final_model.network, (case.train.inputs, case.train.targets)
    free = {n: p.clone().requires_grad_() for n, p in network.named_parameters()}

    def gradients(values: Tensor) -> Tensor:
        each = [torch.autograd.grad(v, list(free.values()), retain_graph=True) for v in values]
        return torch.stack([torch.cat([g.flatten() for g in parts]) for parts in each])

    def call(inputs: Tensor) -> Tensor:
        return torch.func.functional_call(network, free, inputs)[:, 0]

    expected = gradients(call(case.test.inputs)) @ gradients((call(x) - y[:, 0]).square()).T
    torch.testing.assert_close(found, expected.to(found))


def test_runs_are_kept_under_what_is_measured_and_go_on_from_saved_states(tmp_path: Path) -> None:
    case, store = CASES["mlp_classification"](), Store(tmp_path)

    def reused(which: int, epochs: int) -> tuple[float, Tensor]:
        model, test = measuring(case.final_model, [(case.test, MEASUREMENT), (case.test[[0]], which)])
        cost = Cost("further_training")
        protocol = Protocol(lr=0.05, batch_size=5, epochs=epochs)
        found = further_train(model, case.train, test, protocol, 2, UNITS, store=store, cost=cost)
        return cost.reused, found.raw

    assert reused(0, 1)[0] == 0
    assert reused(0, 1)[0] == 1
    assert reused(1, 1)[0] == 0  # another class's probability
    resumed = reused(0, 2)[1]
    fresh_model, fresh_test = measuring(case.final_model, [(case.test, MEASUREMENT), (case.test[[0]], 0)])
    fresh = further_train(
        fresh_model, case.train, fresh_test, Protocol(lr=0.05, batch_size=5, epochs=2), 2, UNITS
    )
    assert torch.equal(resumed, fresh.raw)


def test_a_quantity_that_is_not_there_is_refused() -> None:
    case = CASES["mlp_regression"]()
    with pytest.raises(InputError, match="from -1 to 0 but got 1"):
        measuring(case.final_model, [(case.test, 1)])
    with pytest.raises(InputError, match="from -1 to 0 but got -2"):
        measuring(case.final_model, [(case.test, CORRECT)])
    with pytest.raises(InputError, match="expected 5 numbers but got 2"):
        measuring(case.final_model, [(case.test, [0, 0])])


def test_instances_by_name_are_joined() -> None:
    part = Instances({"a": torch.arange(3), "b": torch.ones(3, 2)}, torch.arange(3))
    both = joined([part, part[[2, 0]]])
    assert both.targets.tolist() == [0, 1, 2, 2, 0]
    assert isinstance(both.inputs, dict)
    assert both.inputs["a"].tolist() == [0, 1, 2, 2, 0]
