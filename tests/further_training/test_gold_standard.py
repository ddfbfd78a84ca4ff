"""The gold standard against a plain loop over single runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fimo.curvature.gradients import InstanceGradients
from fimo.data.instances import Instances
from fimo.engine.context import CPU_BYTES, Setting, chunk_size, worker_threads
from fimo.errors import InputError
from fimo.further_training import Protocol, further_train
from fimo.models.final_model import FinalModel
from fimo.models.losses import Huber, binary_cross_entropy, cross_entropy, mean_squared_error
from tests.cases import CASES, LINEAR_CASES, Case, mlp
from tests.reference import attribution as dense
from tests.reference.further_training import plain_sensitivity

OPTIMIZERS: dict[str, dict] = {
    "sgd": {"lr": 0.05},
    "sgd_decayed": {"lr": 0.05, "weight_decay": 0.1},
    "momentum": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"lr": 0.02, "momentum": 0.8, "nesterov": True},
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.05},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    "lion": {"optimizer": "lion", "lr": 0.003, "weight_decay": 0.1, "betas": (0.9, 0.99)},
    "clipped": {"lr": 0.05, "clip_norm": 0.5},
    "clipped_adam": {"optimizer": "adam", "lr": 0.01, "clip_norm": 0.2},
    "linear_schedule": {"lr": 0.05, "schedule": "linear"},
    "cosine_schedule": {"optimizer": "adam", "lr": 0.01, "schedule": "cosine"},
}
RULES = ["shift", "mask", "every_batch", "reweighted"]
UNITS = [[0], [7], [11], [4, 9]]


def assert_equals_plain_loop(case: Case, protocol: Protocol, tolerance: float = 1e-9, **arguments) -> None:
    """Compare raw changes, losses and distances; tolerance is relative to their largest value."""
    seeds = [3, 0]
    units = arguments.pop("units", UNITS)
    found = further_train(case.final_model, case.train, case.test, protocol, seeds, units, **arguments)
    expected = plain_sensitivity(case.final_model, case.train, case.test, protocol, seeds, units)
    assert found.raw.shape == (2, len(found.step), len(case.test), len(units))
    for name, value in expected.items():
        own = getattr(found, name).double()
        # raw changes are handed out in float32
        atol = max(tolerance, 1e-7 if name != "full_losses" else 0.0) * value.abs().max().item()
        torch.testing.assert_close(own, value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_linear_engine_equals_the_plain_loop(optimizer: str, rule: str) -> None:
    protocol = Protocol(batch_size=5, epochs=3, leave_out=rule, dtype="float64", **OPTIMIZERS[optimizer])
    case = CASES["mlp_classification" if optimizer in ("adam", "sgd") else "mlp_regression"]()
    assert_equals_plain_loop(case, protocol, chunk=3)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_layers_without_a_bias_equal_the_plain_loop(optimizer: str) -> None:
    torch.manual_seed(0)
    data = CASES["mlp_regression"]()
    network = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3), nn.ReLU(),
                            nn.Linear(3, 1, bias=False)).double()  # fmt: skip
    case = Case("biasless", FinalModel(network, mean_squared_error), data.train, data.test)
    protocol = Protocol(batch_size=5, epochs=2, dtype="float64", **OPTIMIZERS[optimizer])
    assert Setting.build(case.final_model, case.train, case.test, protocol).engine == "linear"
    assert_equals_plain_loop(case, protocol, chunk=3)


class Hidden(nn.Module):
    """A network that isn't seen to be one of linear layers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.clone())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ["linear", "functional"])
def test_a_robust_loss_equals_the_plain_loop(engine: str, rule: str) -> None:
    data = CASES["mlp_regression"]()
    network = data.final_model.network if engine == "linear" else Hidden(data.final_model.network)
    case = Case("robust", FinalModel(network, Huber(0.2)), data.train, data.test)
    errors = (case.final_model.outputs(case.train) - case.train.targets).abs()
    assert 3 < int((errors > 0.2).sum()) < 20  # some of either kind
    protocol = Protocol(batch_size=5, epochs=3, leave_out=rule, dtype="float64", **OPTIMIZERS["momentum"])
    assert Setting.build(case.final_model, case.train, case.test, protocol).engine == engine
    assert_equals_plain_loop(case, protocol, chunk=3)


def test_tied_layers_equal_the_plain_loop() -> None:
    """One module at two places of a Sequential: its gradient is the sum over both."""
    torch.manual_seed(0)
    data = CASES["mlp_regression"]()
    tied = nn.Linear(4, 4).double()
    network = nn.Sequential(tied, nn.Tanh(), tied, nn.Tanh(), nn.Linear(4, 1).double())
    case = Case("tied", FinalModel(network, mean_squared_error), data.train, data.test)
    protocol = Protocol(batch_size=5, epochs=2, dtype="float64", **OPTIMIZERS["momentum"])
    assert_equals_plain_loop(case, protocol, chunk=3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["conv_net", "transformer"])
@pytest.mark.parametrize("optimizer", ["momentum", "clipped_adam"])
def test_functional_engine_equals_the_plain_loop(name: str, rule: str, optimizer: str) -> None:
    protocol = Protocol(batch_size=5, epochs=2, leave_out=rule, dtype="float64", **OPTIMIZERS[optimizer])
    case = CASES[name]()
    assert Setting.build(case.final_model, case.train, case.test, protocol).engine == "functional"
    assert_equals_plain_loop(case, protocol, chunk=3)


def tied(kind: str) -> nn.Sequential:
    """Linear layers of 4 units that share a weight, or are one module used twice."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    if kind == "weight":
        second.weight = first.weight
    elif kind == "bias":
        second.bias = first.bias
    else:
        second = first
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("kind", ["weight", "bias", "module"])
def test_a_sequence_of_tied_linear_layers_equals_the_plain_loop(kind: str) -> None:
    case = CASES["mlp_classification"]()
    model = FinalModel(tied(kind), cross_entropy)
    protocol = Protocol(batch_size=5, epochs=2, dtype="float64", **OPTIMIZERS["momentum"])
    assert Setting.build(model, case.train, case.test, protocol).engine != "linear"
    assert_equals_plain_loop(Case(kind, model, case.train, case.test), protocol, chunk=3)
    rows = InstanceGradients(model).losses(case.train).dense()[:, 0]
    torch.testing.assert_close(rows, dense.instance_gradients(model, case.train))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("name", "optimizer", "rule"),
    [("mlp_classification", "sgd", "mask"), ("mlp_regression", "clipped_adam", "every_batch"),
     ("mlp_regression", "sgd_decayed", "shift"), ("conv_net", "momentum", "mask"),
     ("transformer", "adamw", "every_batch")],
)  # fmt: skip
def test_no_result_depends_on_memory_that_was_never_written(name: str, optimizer: str, rule: str) -> None:
    # batches of 5 are padded, and the epoch's last is short
    protocol = Protocol(batch_size=5, epochs=2, leave_out=rule, dtype="float64", **OPTIMIZERS[optimizer])
    assert_equals_plain_loop(CASES[name](), protocol, chunk=3)


class Branching(nn.Module):
    """A network that torch.func can't vectorise: it asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 3, dtype=torch.float64), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.layer(x))
        return y if self.layer.bias.sum().item() > 0 else 2 * y


@pytest.mark.parametrize("rule", RULES)
def test_networks_that_cannot_be_vectorised_equal_the_plain_loop(
    rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    data = CASES["mlp_classification"]()
    case = Case("branching", FinalModel(Branching(), cross_entropy), data.train, data.test)
    protocol = Protocol(batch_size=5, epochs=2, leave_out=rule, dtype="float64")
    assert_equals_plain_loop(case, protocol)
    assert "one by one" in caplog.text


def test_why_a_network_runs_one_by_one_is_said_also_where_its_error_has_no_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Silent(Branching):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(x)
            except RuntimeError:
                raise ArithmeticError from None

    data = CASES["mlp_classification"]()
    model = FinalModel(Silent(), cross_entropy)
    assert Setting.build(model, data.train, data.test, Protocol(epochs=1)).engine == "loop"
    assert "(ArithmeticError)" in caplog.text


def test_large_networks_run_one_by_one_on_a_cpu_and_equal_the_plain_loop(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, protocol = CASES["conv_net"](), Protocol(batch_size=5, epochs=2, dtype="float64", lr=0.05)
    data = (case.final_model, case.train, case.test, protocol)
    assert Setting.build(*data).engine == "functional"
    monkeypatch.setitem(CPU_BYTES, "functional", 2**17)
    with caplog.at_level(logging.INFO):
        setting = Setting.build(*data)
    assert setting.engine == "loop"
    assert "one after another" in caplog.text
    assert worker_threads(setting) == torch.get_num_threads()
    assert_equals_plain_loop(case, protocol)


def test_chunks_are_as_many_as_workers_and_equally_large(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp_regression"]()
    setting = Setting.build(case.final_model, case.train, case.test, Protocol(epochs=1))
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for runs in (1, 5, 70, 100, 1000):
            size = chunk_size(setting, runs)
            chunks = -(-runs // size)
            assert 2 <= size <= 128
            assert chunks % threads == 0 or size <= -(-runs // threads) + 1
            assert runs - size * (chunks - 1) > size - max(chunks, 2)


@pytest.mark.parametrize("rule", RULES)
def test_dropout_equals_the_plain_loop(rule: str) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)).double()
    data = CASES["mlp_classification"]()
    case = Case("dropout", FinalModel(network, cross_entropy), data.train, data.test)
    # batches of runs that leave out instances have as many instances as those of full runs
    protocol = Protocol(batch_size=5, steps=8, evaluate_every=3, leave_out=rule, dtype="float64", lr=0.1)
    assert_equals_plain_loop(case, protocol, chunk=3)


class Attention(nn.Module):
    """Attention over the inputs as four tokens, with dropout inside one operation."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(1, 4), nn.Linear(4, 3)
        self.attention = None if functional else nn.MultiheadAttention(4, 2, 0.3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x[..., None])
        if self.attention is not None:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        rate = 0.3 if self.training else 0.0
        return self.head(nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=rate).mean(1))


class Noisy(nn.Module):
    """Noise in train mode, and recurrent layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(1, 3, 2, batch_first=True, dropout=0.3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.1 * torch.randn_like(x) if self.training else x
        return self.head(self.layers(x[..., None])[0][:, -1])


@pytest.mark.parametrize("rule", ["mask", "shift", "every_batch"])
@pytest.mark.parametrize("network", [lambda: Attention(True), lambda: Attention(False), Noisy])
def test_random_numbers_that_are_not_plain_dropout_s_equal_the_plain_loop(rule: str, network) -> None:
    torch.manual_seed(1)
    data = CASES["mlp_classification"]()
    case = Case("random", FinalModel(network().double(), cross_entropy), data.train, data.test)
    protocol = Protocol(batch_size=5, steps=8, evaluate_every=3, leave_out=rule, dtype="float64", lr=0.1)
    assert_equals_plain_loop(case, protocol, chunk=3)


@pytest.mark.parametrize(
    ("rule", "horizon"),
    [("shift", {"steps": 13}), ("mask", {"steps": 13}), ("shift", {"epochs": 3, "evaluate_every": 4}),
     ("mask", {"epochs": 3, "evaluate_every": 2}), ("shift", {"steps": 10}), ("every_batch", {"steps": 3})],
)  # fmt: skip
def test_any_horizon_and_evaluation_points_equal_the_plain_loop(rule: str, horizon: dict) -> None:
    protocol = Protocol(batch_size=5, leave_out=rule, dtype="float64", lr=0.05, momentum=0.5, **horizon)
    assert_equals_plain_loop(CASES["mlp_regression"](), protocol)


def test_an_epoch_that_loses_its_last_batch_equals_the_plain_loop() -> None:
    case = CASES["mlp_regression"]()
    assert len(case.train) % 11 == 1
    assert_equals_plain_loop(case, Protocol(batch_size=11, epochs=4, dtype="float64", lr=0.05))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU])
@pytest.mark.parametrize(
    "loss", [mean_squared_error, binary_cross_entropy, lambda o, t: (o - t).abs().sum(1)]
)
def test_every_activation_and_loss_of_the_linear_engine(activation: type[nn.Module], loss) -> None:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Flatten(), mlp(4, (6,), 2, activation), activation()).double()
    data = CASES["mlp_regression"]()
    train, test = (
        Instances(d.inputs, torch.rand(len(d), 2).round().double()) for d in (data.train, data.test)
    )
    case = Case("activation", FinalModel(network, loss), train, test)
    protocol = Protocol(batch_size=6, epochs=2, dtype="float64", lr=0.1)
    assert Setting.build(case.final_model, train, test, protocol).engine == "linear"
    assert_equals_plain_loop(case, protocol)


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_float32_changes_equal_those_of_a_float32_loop_to_rounding(name: str) -> None:
    case = CASES[name]()
    assert_equals_plain_loop(case, Protocol(batch_size=5, epochs=4, lr=0.05), tolerance=2e-5)


@pytest.mark.parametrize("name", ["mlp_classification", "conv_net", "transformer"])
def test_autocast_changes_results_by_no_more_than_its_precision(name: str) -> None:
    case = CASES[name]().to(torch.float32)
    data = (case.final_model, case.train, case.test)
    settings = {"batch_size": 5, "epochs": 2, "lr": 0.05}
    exact = further_train(*data, Protocol(**settings), [0], [1, 2])
    lower = further_train(*data, Protocol(**settings, autocast="bfloat16"), [0], [1, 2])
    assert exact.full_losses is not None
    assert lower.full_losses is not None
    difference = (exact.full_losses - lower.full_losses).abs().max() / exact.full_losses.abs().max()
    assert 1e-5 < difference < 2e-2
    correlation = torch.corrcoef(torch.stack([exact.raw.flatten(), lower.raw.flatten()]))[0, 1]
    assert correlation > 0.99


def test_only_trainable_parameters_move() -> None:
    data = CASES["mlp_classification"]()
    network = data.final_model.network
    case = Case("head", FinalModel(network, cross_entropy, trainable=("4.*",)), data.train, data.test)
    assert_equals_plain_loop(case, Protocol(batch_size=5, epochs=2, dtype="float64", lr=0.1))


def test_another_measurement_than_the_loss() -> None:
    data = CASES["mlp_regression"]()

    def measurement(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs[:, 0].exp()

    model = FinalModel(data.final_model.network, mean_squared_error, measurement)
    case = Case("measurement", model, data.train, data.test)
    assert_equals_plain_loop(case, Protocol(batch_size=5, epochs=2, dtype="float64", lr=0.1))


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"left_out": []}, "left_out"),
        ({"left_out": [23]}, "left_out"),
        ({"left_out": [-1]}, "left_out"),
        ({"left_out": [1, [1]]}, "left_out"),
        ({"left_out": [[1, 1]]}, "left_out"),
        ({"left_out": [[]]}, "left_out"),
        ({"left_out": [list(range(23))]}, "left_out"),
        ({"chunk": 0}, "chunk"),
        ({"test_index": [0]}, "test_index"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict, key: str) -> None:
    case = CASES["mlp_regression"]()
    good = {"seeds": [0], "left_out": [0]}
    with pytest.raises(InputError, match=f"^further_training.{key}: "):
        further_train(case.final_model, case.train, case.test, Protocol(epochs=1), **{**good, **arguments})
