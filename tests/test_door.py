"""What users hand over is converted where its meaning is plain, and refused in one line where it is not."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fimo
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training import Protocol, full_runs, further_train
from fimo.further_training.sensitivity import Sensitivity
from fimo.methods.graddot import GradDot
from fimo.models.final_model import FinalModel
from fimo.models.losses import (
    Huber,
    binary_cross_entropy,
    cross_entropy,
    language_modelling,
    logit_margin,
    mean_squared_error,
)
from fimo.store.fingerprint import Problem
from fimo.validation import admission
from fimo.validation.poor import Comparison, best_mixture, compared
from fimo.validation.recomputation import recomputes

PROTOCOL = Protocol(lr=0.05, batch_size=8, epochs=1)


def network(inputs: int = 3, outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def regression(n: int = 20) -> Instances:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    return Instances(x, x[:, :1].sin())


MODEL, DATA = FinalModel(network(), mean_squared_error), regression()


def trained(**changes: Any) -> Sensitivity:
    given = {"seeds": [0, 1], "left_out": [0, 5, 10, 15], **changes}
    return further_train(MODEL, DATA[:16], DATA[16:], PROTOCOL, **given)


@pytest.mark.parametrize("seeds", [2, np.int64(2), np.array([0, 1]), torch.tensor([0, 1]), range(2), (0, 1)])
def test_seeds_are_a_number_or_any_list_of_them(seeds: Any) -> None:
    torch.testing.assert_close(trained(seeds=seeds, left_out=[0, 5]).raw, trained(left_out=[0, 5]).raw)
    assert [run.seed for run in full_runs(MODEL, DATA, PROTOCOL, seeds)] == [0, 1]


@pytest.mark.parametrize(
    "left_out", [4, np.array([0, 4, 8, 12]), torch.tensor([0, 4, 8, 12]), range(0, 16, 4)]
)
def test_left_out_instances_are_a_number_or_any_list_of_them(left_out: Any) -> None:
    assert trained(left_out=left_out).left_out.tolist() == [0, 4, 8, 12]
    found = GradDot().attribute(MODEL, DATA[:16], DATA[16:], left_out).values
    expected = GradDot().attribute(MODEL, DATA[:16], DATA[16:]).values[:, [0, 4, 8, 12]]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ([16], "expected indices from 0 to 15 but got 16"),
        (torch.tensor([-1]), "expected indices from 0 to 15 but got -1"),
        (17, "expected a number from 1 to 16, or a list of indices, but got 17"),
        ([0.5], "expected whole numbers but got 0.5"),
        (np.ones(16, bool), "expected whole numbers but got True"),
        ([], "expected at least one index but got none"),
        (1.5, "a list"),
        ("all", "expected a number of rows, a list of their indices, or None for all, but got 'all'"),
    ],
)
def test_indices_that_are_not_there_are_refused(left_out: Any, said: str) -> None:
    for call in (
        lambda: trained(left_out=left_out),
        lambda: GradDot().attribute(MODEL, DATA[:16], DATA[16:], left_out).values,
    ):
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [(0, "at least 1 seed"), ([0, 0], "twice"), ([-1], r"in [0, 2^31)"), ("ab", "whole"), (None, "of seeds")],
)
def test_seeds_that_mean_nothing_are_refused(seeds: Any, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        trained(seeds=seeds)


def test_a_sensitivity_is_saved_and_read_under_a_text_path(tmp_path: Path) -> None:
    found = trained()
    found.save(str(tmp_path / "found.safetensors"))
    torch.testing.assert_close(Sensitivity.load(str(tmp_path / "found.safetensors")).raw, found.raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1),
        ("lr", "0.1"),
        ("batch_size", 2.5),
        ("momentum", None),
        ("batch_size", True),
        ("epochs", 1.5),
    ],
)
def test_a_bad_value_of_a_protocol_is_named_before_what_is_missing(key: str, value: Any) -> None:
    with pytest.raises(
        InputError, match=rf"^further_training.{key}: expected .* but got {re.escape(repr(value))}"
    ):
        Protocol(**{key: value})


def test_a_protocol_takes_numpys_numbers() -> None:
    protocol = Protocol(lr=np.float32(0.5), batch_size=np.int64(4), epochs=np.int32(2))
    assert protocol == Protocol(lr=0.5, batch_size=4, epochs=2)
    assert type(protocol.lr) is float
    assert type(protocol.epochs) is int


# --- losses and targets


def own_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1)


def both(model: FinalModel, data: Instances) -> tuple[Tensor, Tensor]:
    """Return the gold standard and Grad-Dot's scores of the same problem."""
    found = further_train(model, data[:16], data[16:], PROTOCOL, [0], [0, 5, 10])
    return found.raw, GradDot().attribute(model, data[:16], data[16:], [0, 5, 10]).values


class Plain(nn.Module):
    """No sequence, so that the general engine runs it."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.body = network(outputs=outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("loss", [mean_squared_error, own_squared_error, "mse"])
@pytest.mark.parametrize("make", [network, Plain])
def test_regression_targets_without_an_axis_mean_one_value_for_each_instance(loss: Any, make: Any) -> None:
    model = FinalModel(make(), loss)
    flat = Instances(DATA.inputs, DATA.targets[:, 0])
    for found, expected in zip(both(model, flat), both(model, DATA), strict=True):
        assert torch.equal(found, expected)
    if loss is mean_squared_error:
        torch.testing.assert_close(model.losses(flat), model.losses(DATA))


CLASSES = Instances(DATA.inputs, torch.arange(20) % 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss(reduction="none")])
@pytest.mark.parametrize("column", [False, True])
def test_class_labels_may_have_any_type_of_number(dtype: torch.dtype, loss: Any, column: bool) -> None:
    model = FinalModel(Plain(3), loss)
    labels = CLASSES.targets.to(dtype)
    given = Instances(CLASSES.inputs, labels[:, None] if column else labels)
    for found, expected in zip(both(model, given), both(model, CLASSES), strict=True):
        assert torch.equal(found, expected)


def test_inputs_take_the_networks_dtype() -> None:
    model = FinalModel(network(), mean_squared_error)
    wide = Instances(DATA.inputs.double(), DATA.targets.double())
    for found, expected in zip(both(model, wide), both(model, DATA), strict=True):
        assert torch.equal(found, expected)


def test_whole_numbers_are_values_to_a_squared_error() -> None:
    whole = Instances(DATA.inputs, torch.arange(20) % 4)
    model = FinalModel(network(), mean_squared_error)
    for found, expected in zip(
        both(model, whole), both(model, Instances(DATA.inputs, whole.targets.float()[:, None])), strict=True
    ):
        assert torch.equal(found, expected)


def test_data_sets_and_lists_are_as_good_as_instances() -> None:
    model = FinalModel(network(), mean_squared_error)
    pairs = [(x, float(y)) for x, y in zip(DATA.inputs, DATA.targets, strict=True)]
    tensors = torch.utils.data.TensorDataset(DATA.inputs, DATA.targets[:, 0])
    expected = GradDot().attribute(model, DATA, DATA[:4]).values
    for source in (pairs, tensors):
        found = GradDot().attribute(model, source, DATA[:4]).values
        torch.testing.assert_close(found, expected)
        further = further_train(model, source, DATA[:4], PROTOCOL, [0], [1])
        assert torch.equal(further.raw, further_train(model, DATA, DATA[:4], PROTOCOL, [0], [1]).raw)


class Returning(nn.Module):
    """Returns what a function makes of the outputs and inputs."""

    def __init__(self, change: Any, outputs: int = 1) -> None:
        super().__init__()
        self.body, self.change = network(outputs=outputs), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.body(x), x)


class Normalised(nn.Module):
    """Batch normalisation with the batch's own statistics in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


class CoupledInTraining(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y - y.mean(0) if self.training else y


class Output(dict[str, Any]):
    """As transformers returns."""


@pytest.mark.parametrize(
    ("model", "loss", "key", "said"),
    [
        (network(), nn.MSELoss(), "model.loss", "one number for all; build the loss with reduction='none'"),
        (network(outputs=2), nn.MSELoss(reduction="none"), "model.loss", ".flatten(1).mean(1)"),
        (network(), lambda o, t: (o - t).square().mean().expand(len(o)), "model.loss", "over the batch"),
        (network(), lambda o, t: (o - t).square().flip(0)[:, 0], "model.loss", "an instance's value changes"),
        (network(), lambda o, t: (o > t).float()[:, 0], "model.loss", "has no derivative"),
        (network(), lambda o, t: [0.0] * len(o), "model.loss", "expected a tensor [n] but got list"),
        (network(outputs=2), mean_squared_error, "model.loss", "shape (2,) for each instance don't go"),
        (Normalised(), mean_squared_error, "model.network", "without running statistics (norm)"),
        (CoupledInTraining(), mean_squared_error, "model.network", "in train mode"),
        (Returning(lambda y, x: y - x.mean()), mean_squared_error, "model.network", "each instance alone"),
        (Returning(lambda y, x: (y, x)), mean_squared_error, "model.network", "Adapted(network, output=0)"),
        (Returning(lambda y, x: Output(logits=y)), mean_squared_error, "model.network", "output='logits')"),
        (Returning(lambda y, x: y[:, 0]), mean_squared_error, "model.network", "column=True"),
        (network(4), mean_squared_error, "model.network", "does not fit the data (inputs (3,) float32 each)"),
    ],
)  # fmt: skip
def test_what_gives_no_value_of_each_instance_alone_is_refused(
    model: nn.Module, loss: Any, key: str, said: str
) -> None:
    final_model = FinalModel(model, loss)
    for call in (
        lambda: further_train(final_model, DATA, DATA, PROTOCOL, [0], [0]),
        lambda: list(full_runs(final_model, DATA, PROTOCOL, [0])),
        lambda: GradDot().attribute(final_model, DATA, DATA).values,
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.key == key
        assert said in caught.value.problem
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "loss", "key", "said"),
    [
        (torch.arange(20) % 5, cross_entropy, "dataset.train",
         "instance 3 has the label 3; the network has outputs for 3 classes"),
        (torch.arange(20) % 3 - 1, cross_entropy, "dataset.train", "instance 0 has the label -1"),
        ((torch.arange(20) % 3) * 0.5, cross_entropy, "dataset.train", "instance 1 has the label 0.5"),
        (torch.full((20,), torch.nan), cross_entropy, "dataset.train", "NaN or infinite targets"),
        (torch.rand(20, 3), cross_entropy, "model.loss", "class probabilities [n, 3]"),
        (torch.rand(20, 3) * 2, binary_cross_entropy, "dataset.train", "expected numbers from 0 to 1"),
        (torch.rand(20, 2), mean_squared_error, "model.loss", "don't go with targets of shape (2,)"),
    ],
)  # fmt: skip
def test_targets_that_a_loss_cannot_mean_are_refused(targets: Tensor, loss: Any, key: str, said: str) -> None:
    model, data = FinalModel(network(outputs=3), loss), Instances(DATA.inputs, targets)
    for call in (
        lambda: further_train(model, data, data, PROTOCOL, [0], [0]),
        lambda: GradDot().attribute(model, data, data).values,
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.key == key
        assert said in caught.value.problem


def test_a_label_of_the_test_set_is_named_as_such() -> None:
    model = FinalModel(network(outputs=3), cross_entropy)
    test = Instances(DATA.inputs, torch.full((20,), 7))
    with pytest.raises(InputError, match=r"^dataset.test: instance 0 has the label 7"):
        GradDot().attribute(model, CLASSES, test)


def test_a_measurement_of_classes_needs_classes() -> None:
    with pytest.raises(InputError, match=r"^model.measurement: logit_margin needs classes"):
        GradDot().attribute(FinalModel(network(), mean_squared_error, logit_margin), DATA, DATA)


@pytest.mark.parametrize("functional", [False, True])
def test_dropout_couples_no_instances(functional: bool) -> None:
    class Dropping(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.dropout(x, 0.5, self.training) if functional else self.dropout(x)
            return self.body(x)

    assert torch.isfinite(both(FinalModel(Dropping(), mean_squared_error), DATA)[0]).all()


class Changing(Plain):
    """Outputs that change from call to call: noise in every mode, a counter, NumPy's noise in train mode."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kind == "noise":
            return self.body(x) + torch.randn(len(x), 1)
        if self.kind == "counter":
            return self.body(x) * (1 + 0.01 * self.calls)
        return self.body(x) + float(np.random.default_rng().normal()) if self.training else self.body(x)


@pytest.mark.parametrize(
    ("kind", "where"),
    [("noise", "in eval mode"), ("counter", "in eval mode"), ("numpy", "in a training step of one seed")],
)
def test_outputs_that_change_from_call_to_call_are_refused_as_such(kind: str, where: str) -> None:
    said = f"^model.network: outputs or losses of the same instances change from one call to the next {where}"
    with pytest.raises(InputError, match=said):
        both(FinalModel(Changing(kind), mean_squared_error), DATA)


def test_the_instance_that_a_network_fails_on_is_named() -> None:
    class Choosy(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if (x == 0).all(1).any():
                raise ValueError("nothing to look at")
            return self.body(x)

    for place, said in ((9, "dataset.train: the model fails on instance 9"), (11, "dataset.test: .* 1")):
        inputs = DATA.inputs.clone()  # type: ignore[union-attr]
        inputs[place] = 0
        data = Instances(inputs, DATA.targets)
        with pytest.raises(InputError, match=f"^{said}: .*nothing to look at"):
            admission.admit(FinalModel(Choosy(), mean_squared_error), data[:10], data[10:])


def test_a_network_that_computes_otherwise_where_gradients_are_taken_is_refused() -> None:
    class Branching(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * (1.0 if torch.is_grad_enabled() else 0.9)

    said = "^model.network: its outputs in eval mode are others under torch.no_grad"
    with pytest.raises(InputError, match=said):
        both(FinalModel(Branching(), mean_squared_error), DATA)


def test_random_numbers_that_go_by_an_instance_s_place_are_no_coupling_and_the_batch_s_mean_is() -> None:
    class Noisy(Plain):
        coupled = False

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x + 0.5 * torch.randn_like(x)
                x = x - x.mean(0) if self.coupled else x
            return self.body(x)

    assert torch.isfinite(both(FinalModel(Noisy(), mean_squared_error), DATA)[0]).all()
    coupled = Noisy()
    coupled.coupled = True
    with pytest.raises(InputError, match=r"^model.network: .* other instances of a batch in train mode"):
        both(FinalModel(coupled, mean_squared_error), DATA)


@pytest.mark.parametrize("functional", [False, True])
def test_dropout_inside_attention_couples_no_instances_that_are_trimmed_together(functional: bool) -> None:
    class Trimmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 1)
            self.attention = nn.MultiheadAttention(4, 2, 0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, : int((x != 0).sum(1).max())]
            hidden, padding = self.embedding(x), x == 0
            if functional:
                rate, mask = 0.5 if self.training else 0.0, ~padding[:, None]
                hidden = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden, mask, rate)
            else:
                hidden, _ = self.attention(hidden, hidden, hidden, padding, need_weights=False)
            return self.head(hidden[:, 0])

    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 5, (20, 6), generator=g)
    tokens[torch.arange(6) >= torch.randint(1, 7, (20, 1), generator=g)] = 0
    data = Instances(tokens, DATA.targets)
    assert torch.isfinite(both(FinalModel(Trimmed(), mean_squared_error), data)[0]).all()


@pytest.mark.parametrize("detached", [False, True])
def test_outputs_without_a_derivative_in_the_parameters_are_refused(detached: bool) -> None:
    class Without(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if detached:
                return self.body(x).detach()
            with torch.no_grad():
                return self.body(x)

    with pytest.raises(InputError, match=r"^model.network: its outputs have no derivative"):
        both(FinalModel(Without(), mean_squared_error), DATA)


def test_what_was_checked_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = FinalModel(network(), mean_squared_error), []
    monkeypatch.setattr(admission, "_checked", lambda *a: calls.append(a) or (a[1], a[2] or a[1]))
    for _ in range(3):
        admission.admit(model, DATA, DATA[:4])
    assert len(calls) == 1
    changed = Instances(DATA.inputs, DATA.targets.clone())
    changed.targets[0] = 3
    admission.admit(model, changed, DATA[:4])
    assert len(calls) == 2


# --- tensors inside a loss


class Weighted:
    """A callable with a weight."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, self.weight, reduction="none")


WEIGHT = torch.tensor([0.5, 2.0, 3.0])


def globally_weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, WEIGHT, reduction="none")


def closed_over(weight: Tensor) -> Any:
    return lambda o, t: F.cross_entropy(o, t, weight, reduction="none")


@pytest.mark.parametrize(
    "loss",
    [
        Weighted(WEIGHT), globally_weighted, closed_over(WEIGHT), Weighted(WEIGHT).__call__,
        nn.CrossEntropyLoss(weight=WEIGHT, reduction="none"),
        functools.partial(F.cross_entropy, weight=WEIGHT, reduction="none"),
    ],
)  # fmt: skip
def test_class_weights_inside_a_loss_follow_the_dtype(loss: Any) -> None:
    def reference(outputs: Tensor, targets: Tensor) -> Tensor:
        weight = torch.tensor([0.5, 2.0, 3.0]).to(outputs.dtype)
        return weight[targets] * F.cross_entropy(outputs, targets, reduction="none")

    found, expected = (both(FinalModel(network(outputs=3), given), CLASSES) for given in (loss, reference))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert WEIGHT.dtype == torch.float32


class Delegating:
    """Asks the loss that it holds for all that it lacks, itself included where it holds none yet."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.weight = loss, WEIGHT

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets)


def test_a_loss_that_can_not_be_copied_is_refused_in_one_line() -> None:
    with pytest.raises(
        InputError, match=r"^model\.loss: Delegating holds tensors .* can't be copied: its __getattr__"
    ):
        FinalModel(network(outputs=3), Delegating(Weighted(WEIGHT)))


def test_a_loss_with_weights_has_a_key_of_its_own() -> None:
    def hashed(weight: Tensor) -> Any:
        model = FinalModel(network(outputs=3), closed_over(weight))
        return Problem.of(model, CLASSES).parts["loss"]

    assert hashed(WEIGHT) == hashed(WEIGHT.clone()) != hashed(WEIGHT * 1.001)


# --- parameters


def test_parameters_that_the_user_froze_stay_frozen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    frozen = network()
    frozen[0].requires_grad_(False)
    model, named = FinalModel(frozen, mean_squared_error), FinalModel(network(), "mse", trainable=("2.*",))
    assert list(model.parameters()) == list(named.parameters()) == ["2.weight", "2.bias"]
    assert "0.weight, 0.bias: not trained" in caplog.text
    for found, expected in zip(both(model, DATA), both(named, DATA), strict=True):
        assert torch.equal(found, expected)
    assert list(model.to(dtype=torch.float64).parameters()) == ["2.weight", "2.bias"]
    assert list(FinalModel(frozen, "mse", trainable=("0.*",)).parameters()) == ["0.weight", "0.bias"]
    assert len(FinalModel(network().requires_grad_(False), "mse").parameters()) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((network(), "mae"), "model.loss: expected a function or one of mse"),
        ((network(), nn.MSELoss), "model.loss: MSELoss is a class"),
        ((network(), None), "model.loss: must be given"),
        ((lambda x: x, "mse"), "model.network: expected a torch.nn.Module but got function"),
        ((nn.ReLU(), "mse"), "model.network: has no parameter"),
    ],
)
def test_a_final_model_of_other_things_is_refused(arguments: Any, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        FinalModel(*arguments)


# --- a network that ends in softmax, under a loss that takes logits


class Probabilities(nn.Module):
    """Ends in softmax, or in its logarithm."""

    def __init__(self, width: int = 3, logarithm: bool = False) -> None:
        super().__init__()
        self.logits, self.logarithm = network(outputs=width), logarithm

    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits(x)
        return logits.log_softmax(1) if self.logarithm else logits.softmax(1)


CLASSES = Instances(DATA.inputs, torch.arange(20) % 3)


def test_probabilities_where_cross_entropy_takes_logits_are_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = FinalModel(Probabilities(), "cross_entropy", accept_poor=True)
    for end in (20, 19):  # of which the second is admitted anew
        GradDot().attribute(model, CLASSES[:16], CLASSES[16:end])
    assert caplog.text.count("outputs look like probabilities (each row adds up to 1)") == 1
    assert "cross_entropy takes logits: leave out the last softmax, or take its logarithm" in caplog.text


@pytest.mark.parametrize(
    ("network", "loss"),
    [
        (Probabilities(logarithm=True), "cross_entropy"),
        (network(outputs=3), "cross_entropy"),
        (Probabilities(), lambda outputs, targets: F.nll_loss(outputs.log(), targets, reduction="none")),
    ],
)
def test_logits_log_probabilities_and_a_loss_of_probabilities_are_not_warned_of(
    network: nn.Module, loss: Any, caplog: pytest.LogCaptureFixture
) -> None:
    GradDot().attribute(FinalModel(network, loss, accept_poor=True), CLASSES[:16], CLASSES[16:])
    assert "probabilities" not in caplog.text


# --- data that are changed in place


@pytest.mark.parametrize("rows", [40, 2**16])
def test_data_changed_in_place_through_numpy_are_looked_at_again(rows: int) -> None:
    """They are converted to the network's float32, and no version of a tensor counts what NumPy writes."""
    x, labels = np.random.default_rng(0).normal(size=(rows, 9)), (np.arange(rows) % 3).astype(np.int32)
    train = Instances(torch.from_numpy(x), torch.from_numpy(labels))
    test = Instances(torch.from_numpy(x[:4].copy()), torch.from_numpy(labels[:4].copy()))
    model = FinalModel(network(9, 3), cross_entropy, accept_poor=True)
    admitted = [admission.admit(model, train, test)[0]]
    x[0], labels[1] = -x[0], 0
    admitted.append(admission.admit(model, train, test)[0])
    test.inputs.data[0] += 1
    changed = admission.admit(model, train, test)[1]
    first, second = (part.inputs[0] for part in admitted)
    torch.testing.assert_close(second, -first)
    assert admitted[1].targets[:3].tolist() == [0, 0, 2]
    torch.testing.assert_close(changed.inputs, test.inputs.float())


def test_what_is_taken_as_it_is_is_never_remembered() -> None:
    """Labels are converted, inputs are not: they are those of the call, whatever became of the first ones."""
    x, labels = DATA.inputs.numpy().copy(), torch.arange(20, dtype=torch.int32) % 3
    model, again = FinalModel(network(outputs=3), cross_entropy, accept_poor=True), torch.from_numpy(x.copy())
    admission.admit(model, Instances(torch.from_numpy(x), labels))
    x[:] = 0
    found, _ = admission.admit(model, Instances(again, labels))
    assert found.inputs is again
    assert found.targets.dtype == torch.int64


# --- a final model worse than a constant


def test_a_model_that_is_worse_than_a_constant_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    bad = Instances(DATA.inputs, DATA.targets + 30)  # targets scaled otherwise
    model = FinalModel(network(), mean_squared_error)
    for _ in range(2):
        GradDot().attribute(model, bad[:16], bad[16:])
    assert caplog.text.count("predicts worse than constant outputs") == 1
    assert "prepared otherwise than when it was trained" in caplog.text
    caplog.clear()
    GradDot().attribute(FinalModel(network(), mean_squared_error, accept_poor=True), bad[:16], bad[16:])
    assert "predicts worse" not in caplog.text


@pytest.mark.parametrize(
    ("loss", "width"),
    [
        (mean_squared_error, 2),
        (cross_entropy, 3),
        (binary_cross_entropy, 2),
        (language_modelling, 3),
        (Huber(0.2), 2),
    ],
)
def test_no_other_constant_outputs_have_a_smaller_loss(loss: Any, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    classes = loss in (cross_entropy, language_modelling)
    targets = (
        torch.randint(3, (50, 4), generator=generator) if classes else torch.rand(50, 2, generator=generator)
    )
    targets = targets[:, 0] if loss is cross_entropy else targets
    best = loss.best_constant(targets, width)
    assert best is not None

    def mean(outputs: Tensor) -> float:
        shape = (*targets.shape, width) if classes else targets.shape
        return loss(outputs.expand(shape), targets.double() if not classes else targets).mean().item()

    for direction in torch.randn(20, width, generator=generator, dtype=torch.float64):
        assert mean(best) <= mean(best + 1e-2 * direction)


def test_an_overfitted_model_is_not_mixed_up() -> None:
    model = FinalModel(nn.Linear(3, 1, bias=False), mean_squared_error)
    fitting = Instances(DATA.inputs, model.outputs(DATA))
    other = Instances(DATA.inputs, -9 * model.outputs(DATA))
    assert poor(model, fitting, other) is None
    assert poor(model, other, other) is not None


def poor(model: FinalModel, train: Instances, test: Instances) -> str | None:
    found = compared(model, train, test)
    assert isinstance(found, Comparison), found
    return found.poor


def of_probabilities(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of outputs that are probabilities: beyond 1 it would be 0 for any class."""
    return -outputs.clamp(1e-7, 1).log().gather(1, targets[:, None])[:, 0]


def log_density(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of a normal distribution, whose mean and log variance are the outputs; negative where it is narrow."""
    mean, log_variance = outputs[:, :1], outputs[:, 1:]
    return 0.5 * ((targets - mean).square() / log_variance.exp() + log_variance)[:, 0]


def own_huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.huber_loss(outputs, targets, reduction="none").flatten(1).mean(1)


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of sequences of classes, where a target below 0 says that there is none."""
    kept = (targets >= 0).to(outputs.dtype)
    losses = nn.functional.cross_entropy(outputs.transpose(1, 2), targets.clamp(min=0), reduction="none")
    return (losses * kept).sum(1) / kept.sum(1).clamp(min=1)


class Fixed(nn.Module):
    """Gives its inputs as outputs, so that a test can say what a model predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def judged_examples() -> dict[str, tuple[Any, Tensor, Tensor, Tensor]]:
    """A loss, targets, and outputs of a good and of a poor model."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(120, 1, generator=generator)
    noise = torch.randn(120, 1, generator=generator)
    classes = torch.randint(3, (120,), generator=generator)
    logits = 2.0 * nn.functional.one_hot(classes, 3) + 0.5 * torch.randn(120, 3, generator=generator)
    tokens = torch.randint(3, (120, 4), generator=generator)
    sequence = 2.0 * nn.functional.one_hot(tokens, 3)
    tokens[:, 3] = -1
    narrow = torch.full_like(y, -6.0)
    return {
        "scaled targets": (own_huber, y + 100, y + 100 + 0.3 * noise, y),
        "other order of labels": (of_probabilities, classes, logits.softmax(1), logits.roll(1, 1).softmax(1)),
        "density": (log_density, 0.1 * y, torch.cat([0.1 * y + 0.03 * noise, narrow], 1),
                    torch.cat([0.1 * y + noise, narrow], 1)),
        "sequences": (masked, tokens, sequence, sequence.roll(1, 2)),
    }  # fmt: skip


@pytest.mark.parametrize("name", judged_examples())
def test_under_a_loss_of_ones_own_a_poor_model_is_found_and_a_good_one_is_not(name: str) -> None:
    loss, targets, good, bad = judged_examples()[name]
    model = FinalModel(Fixed(), loss)
    for outputs, expected in ((good, False), (bad, True)):
        data = Instances(outputs, targets)
        assert (poor(model, data[:80], data[80:]) is not None) == expected


def test_a_loss_of_ones_own_that_is_a_known_one_has_the_known_ones_best_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (300,), generator=generator).clamp(max=1) * 2  # of three one does not occur
    logits = 6 * torch.randn(300, 3, generator=generator)
    own = FinalModel(Fixed(), lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"))
    found = compared(own, Instances(logits, classes), Instances(logits, classes))
    expected = compared(
        FinalModel(Fixed(), cross_entropy), Instances(logits, classes), Instances(logits, classes)
    )
    assert isinstance(found, Comparison)
    assert isinstance(expected, Comparison)
    assert found.constant.mean().item() == pytest.approx(expected.constant.mean().item(), rel=1e-2)
    y = torch.rand(90, 2, generator=generator).double() + 7
    data = Instances(y.new_zeros(90, 2), y)
    mixture = best_mixture(FinalModel(Fixed().double(), own_square), data)
    assert isinstance(mixture, Tensor)
    torch.testing.assert_close(mixture, y.mean(0), rtol=1e-4, atol=0)


def own_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1)


def test_where_no_best_constant_is_known_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def fails_on_constants(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) > 4 and (outputs == outputs[:1]).all():
            raise ValueError("no variance")
        return own_huber(outputs, targets)

    model, data = FinalModel(network(), fails_on_constants), DATA
    with caplog.at_level("INFO"):
        for _ in range(2):
            GradDot().attribute(model, data[:16], data[16:])
    said = "can't be told: the loss of constant outputs fails: no variance"
    assert caplog.text.count(said) == 1
    loss, tokens, sequences, _ = judged_examples()["sequences"]
    whole, part = Instances(sequences, tokens), Instances(sequences[:, :3], tokens[:, :3])
    assert "another shape" in str(compared(FinalModel(Fixed(), loss), whole, part))
    wide = Instances(torch.zeros(20, 2**17), torch.zeros(20, 2**17))
    assert "131,072 outputs for each instance are too many" in str(
        best_mixture(FinalModel(Fixed(), own_huber), wide)
    )


class Recomputing(nn.Module):
    """Calls a part of its forward pass again in the backward pass.

    Args:
        how: of it.
        always: in eval mode too.
    """

    def __init__(self, how: str, always: bool, inputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.how, self.always = nn.Linear(inputs, 5), nn.Linear(5, 1), how, always

    def block(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) * 2).tanh())

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.always):
            return self.block(x)
        if self.how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.how == "reentrant")


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "save_on_cpu"])
@pytest.mark.parametrize("always", [False, True])
def test_a_network_that_computes_parts_again_in_the_backward_pass_is_refused(how: str, always: bool) -> None:
    model = FinalModel(Recomputing(how, always), mean_squared_error, accept_poor=True)
    calls = [
        lambda: further_train(model, DATA[:16], DATA[16:], PROTOCOL, [0], [0]),
        lambda: fimo.attribute(model, DATA[:16], DATA[16:], "graddot"),
        lambda: fimo.attribute(model, DATA[:16], DATA[16:], "calibrated", further_training=PROTOCOL),
        lambda: fimo.further_train(model, DATA[:16], DATA[16:], PROTOCOL, 1, 2),
    ]
    for call in calls:
        with pytest.raises(
            InputError, match=r"^model\.network: .*torch\.utils\.checkpoint.* switch that off"
        ):
            call()


def test_what_a_network_leaves_for_its_backward_pass_is_tried_without_a_trace() -> None:
    model = FinalModel(network(), mean_squared_error, accept_poor=True)
    state = torch.get_rng_state()
    assert not recomputes(model, DATA[:2].inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.requires_grad for p in model.network.parameters())
    assert not model.network.training
    assert not recomputes(model, torch.randn(2, 7))  # it fails on them, which is not for this check to say


class Constrained(nn.Module):
    """Ends in a layer with a max-norm constraint, as EEGNet's.

    Args:
        how: the constraint is put on the weights: ``assign`` puts other data in their place.
        only: in which mode, or on weights of which size; "" for always.
    """

    def __init__(self, how: str, only: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.how, self.only = nn.Linear(3, 5), nn.Linear(5, 3), how, only

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight
        bound = torch.renorm(weight.data, 2, 0, 2.0 if self.only == "large" else 0.3)
        if self.how == "in place":
            weight.data.copy_(bound)
        elif not (self.only == "train" and not self.training) and not torch.equal(bound, weight.data):
            weight.data = bound
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("only", ["", "train", "large"])
def test_weights_whose_data_a_forward_pass_assigns_anew_are_refused(only: str) -> None:
    model = FinalModel(Constrained("assign", only), cross_entropy, accept_poor=True)
    with pytest.raises(InputError, match=r"^model\.network: .* data of second\.weight, .*copy_") as found:
        further_train(model, CLASSES[:16], CLASSES[16:], PROTOCOL, [0], [0])
    assert "\n" not in str(found.value)


def test_a_constraint_that_is_written_into_the_weights_is_followed() -> None:
    model = FinalModel(Constrained("in place").double(), cross_entropy, accept_poor=True)
    protocol = Protocol(lr=0.5, batch_size=8, epochs=2, dtype="float64", evaluate_every="end")
    found = further_train(model, CLASSES[:16], CLASSES[16:], protocol, [0], [3]).raw

    def losses(left_out: set[int]) -> Tensor:
        network, draws = Constrained("in place").double(), torch.Generator().manual_seed(0)
        for _ in range(2):
            order = torch.tensor(
                [i for i in torch.randperm(16, generator=draws).tolist() if i not in left_out]
            )
            for batch in order.split(8):
                network.zero_grad()
                F.cross_entropy(network(DATA.inputs[batch].double()), CLASSES.targets[batch]).backward()
                with torch.no_grad():
                    for p in network.parameters():
                        p -= 0.5 * p.grad
        return F.cross_entropy(network(DATA.inputs[16:].double()), CLASSES.targets[16:], reduction="none")

    torch.testing.assert_close(found[0, 0, :, 0], (losses({3}) - losses(set())).detach().to(found.dtype))


def test_a_network_with_a_parameter_that_is_not_finite_is_refused_by_its_name() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        network[2].weight[0, 1] = torch.nan
    model = fimo.FinalModel(network, "mse", accept_poor=True)
    pair = (torch.randn(8, 3), torch.randn(8, 1))
    with pytest.raises(InputError, match=r"model\.network: its parameter 2\.weight holds NaN"):
        fimo.attribute(model, pair, pair, "graddot")
