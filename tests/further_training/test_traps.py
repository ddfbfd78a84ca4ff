"""Known ways to get further training wrong."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk, shared_steps
from fimo.engine.context import Setting, worker_threads
from fimo.engine.driver import ReplicaProgress
from fimo.engine.leave_out import make_rule
from fimo.errors import InputError
from fimo.further_training import BatchStream, Protocol, Replica, full_runs, further_train
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy
from fimo.models.train_mode import TrainMode
from fimo.store.files import Store
from tests.cases import CASES, LINEAR_CASES, Case, mlp
from tests.reference.further_training import plain_run, plain_sensitivity


def epoch_batches(protocol: Protocol, replica: Replica, n: int, epochs: int) -> list[list[list[int]]]:
    """Return the batches of each epoch of one run, as lists of indices."""
    stream = BatchStream([replica], make_rule(protocol, n), protocol, torch.float32, "cpu")
    batches = stream.starting_at(0)
    count = protocol.batches_per_epoch(stream.kept)
    return [[next(batches).index[0].tolist() for _ in range(count)] for _ in range(epochs)]


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize("i", [0, 5, 21])
def test_shift_removes_the_instance_from_the_seeds_own_permutation(i: int) -> None:
    n, protocol = 22, Protocol(batch_size=7, epochs=3)
    full = epoch_batches(protocol, Replica(4), n, 3)
    without = epoch_batches(protocol, Replica(4, (i,)), n, 3)
    assert len(without[0]) == len(full[0]) - 1, "an epoch of 21 instances has one batch fewer"
    for kept, whole in zip(without, full, strict=True):
        assert Counter(flat(whole)) - Counter(flat(kept)) == Counter([i])
        position = flat(whole).index(i)
        assert [j for j in flat(whole) if j != i] == flat(kept), "later batches move up by one"
        before = position // protocol.batch_size
        assert kept[:before] == whole[:before]
    generator = torch.Generator().manual_seed(4)
    for whole in full:
        assert flat(whole) == torch.randperm(n, generator=generator).tolist()


def test_mask_keeps_batches_and_their_divisor() -> None:
    protocol = Protocol(batch_size=7, epochs=1, leave_out="mask")
    stream = BatchStream(
        [Replica(4), Replica(4, (3,))], make_rule(protocol, 22), protocol, torch.float64, "cpu"
    )
    batches = stream.starting_at(0)
    for _ in range(4):
        batch = next(batches)
        index, (full, masked) = batch.index[0], batch.weight
        assert torch.equal(full, torch.full_like(full, 1 / len(index)))
        assert torch.equal(masked, full * (index != 3))


class WithDropout(nn.Module):
    """Dropout in a network that gives instances labelled 2 a loss of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 16, dtype=torch.float64), nn.Linear(16, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(torch.relu(self.up(x)), 0.5, self.training))


def without_label_2(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets) * (targets != 2)


@pytest.mark.parametrize("rule", ["mask", "every_batch"])
@pytest.mark.parametrize("dropout", [False, True])
def test_leaving_out_an_instance_of_zero_loss_changes_nothing_at_all(rule: str, dropout: bool) -> None:
    torch.manual_seed(0)
    data = CASES["mlp_classification"]()
    network = WithDropout() if dropout else mlp(4, (8,), 3, nn.ReLU).double()
    model = FinalModel(network, without_label_2)
    zero = (data.train.targets == 2).nonzero()[:, 0].tolist()
    other = (data.train.targets != 2).nonzero()[0].tolist()
    assert len(zero) > 1
    protocol = Protocol(batch_size=5, epochs=2, leave_out=rule, lr=0.1, dtype="float64")
    found = further_train(
        model, data.train, data.test, protocol, [0, 1], [*zero, *other], chunk=len(zero) + 2
    )
    raw = found.raw.abs().amax((0, 1, 2))
    assert raw[-1] > 0
    assert raw[:-1].max() == 0


def test_dropout_masks_differ_between_seeds_and_steps_and_agree_within_a_seed() -> None:
    """With weights of zero but for the last bias, gradients show the masks."""
    torch.manual_seed(0)
    case = CASES["mlp_classification"]()
    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    protocol = Protocol(batch_size=23, epochs=2, leave_out="mask", dtype="float64")
    setting = Setting.build(FinalModel(network, cross_entropy), case.train, case.test, protocol)
    assert setting.stochastic
    same = Chunk(setting, [Replica(0), Replica(0, (1,)), Replica(0, (2,))])
    batch = next(same.stream.starting_at(0))
    weight = torch.ones_like(batch.weight) / 23
    gradients = []
    for seed in (0, 0, 1):
        same.network.differentiate(setting.train, type(batch)(batch.index, weight), seed)
        gradients.append(same.network.gradients["3.weight"].clone())
    torch.testing.assert_close(gradients[0][0], gradients[0][1])
    torch.testing.assert_close(gradients[0][0], gradients[0][2])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


class ConvDropout(nn.Module):
    """Large enough that several threads share its products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 64, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(self.dropout(x).flatten(1))


@pytest.mark.parametrize("rule", ["shift", "mask"])
def test_runs_with_dropout_are_the_same_bytes_whatever_the_threads_and_the_chunk(rule: str) -> None:
    torch.manual_seed(0)
    data = Instances(torch.randn(110, 1, 12, 12), torch.randint(3, (110,)))
    model, train, test = FinalModel(ConvDropout(), cross_entropy), data[:90], data[90:]
    protocol = Protocol(lr=0.05, batch_size=30, epochs=1, leave_out=rule)
    before, found = torch.get_num_threads(), []
    try:
        for threads, chunk in ((1, "auto"), (2, "auto"), (2, 1), (3, 3), (4, 5)):
            torch.set_num_threads(threads)
            found.append(further_train(model, train, test, protocol, [0, 1], range(5), chunk=chunk))
    finally:
        torch.set_num_threads(before)
    assert found[0].raw.abs().max() > 0
    for other in found[1:]:
        assert torch.equal(other.raw, found[0].raw)
        assert torch.equal(other.full_losses, found[0].full_losses)


@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
def test_runs_with_dropout_equal_the_plain_loop(rule: str) -> None:
    torch.manual_seed(0)
    case = CASES["mlp_classification"]()
    model = FinalModel(WithDropout(), cross_entropy)
    protocol = Protocol(batch_size=5, epochs=2, leave_out=rule, lr=0.1, dtype="float64")
    found = further_train(model, case.train, case.test, protocol, [3, 0], [0, 7, 11])
    expected = plain_sensitivity(model, case.train, case.test, protocol, [3, 0], [[0], [7], [11]])
    torch.testing.assert_close(found.full_losses, expected["full_losses"])
    torch.testing.assert_close(found.raw.double(), expected["raw"], rtol=0, atol=1e-7)


def test_runs_of_two_seeds_in_the_same_order_differ_by_dropout_alone() -> None:
    """With a batch of all instances, nothing but the masks differs between seeds."""
    torch.manual_seed(0)
    case = CASES["mlp_classification"]()
    protocol = Protocol(batch_size=23, epochs=2, lr=0.1, dtype="float64")
    for network, alike in ((WithDropout(), False), (mlp(4, (8,), 3, nn.ReLU).double(), True)):
        model = FinalModel(network, cross_entropy)
        losses = further_train(model, case.train, case.test, protocol, [0, 1], [1]).full_losses
        assert torch.allclose(losses[0], losses[1], rtol=1e-12) == alike


class Normalised(nn.Module):
    """Subtracts a running mean of its inputs, kept in a buffer, and applies dropout."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.up, self.down = nn.Linear(4, 16, dtype=torch.float64), nn.Linear(16, 3, dtype=torch.float64)
        self.dropout, self.always = nn.Dropout(0.3), always

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.always:
            self.mean += 0.1 * (x.detach().mean(0) - self.mean)
        return self.down(self.dropout(torch.relu(self.up(x - self.mean))))


class Inside(nn.Module):
    """Changes the buffer of a module that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Normalised()
        self.inner.training = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.inner.mean += 0.1
        return self.inner(x)


def spectral(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(4, 16)), nn.Tanh(), norm(nn.Linear(16, 3))).double()


CHANGING = {
    "parametrized": lambda: spectral(torch.nn.utils.parametrizations.spectral_norm),
    "hooked": lambda: spectral(torch.nn.utils.spectral_norm),
    "running mean": Normalised,
    "inside": Inside,
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
@pytest.mark.parametrize("kind", CHANGING)
def test_modules_whose_buffers_train_mode_changes_stay_in_eval_mode(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    case = CASES["mlp_classification"]()
    network = CHANGING[kind]()
    before = {n: b.clone() for n, b in network.named_buffers()}
    model = FinalModel(network, cross_entropy)
    data = (model, case.train, case.test, Protocol(batch_size=5, epochs=3, lr=0.1, dtype="float64"), [0, 1])
    with caplog.at_level(logging.INFO):
        whole = further_train(*data, range(8))
    assert "further training keeps them in eval mode" in caplog.text
    single, few = further_train(*data, range(8), chunk=1), further_train(*data, [3, 5])
    assert torch.equal(single.raw, whole.raw)
    assert torch.equal(few.raw, whole.raw[..., [3, 5]])
    assert torch.equal(single.full_losses, whole.full_losses)
    assert torch.equal(few.full_losses, whole.full_losses)
    for either in (network, model.network):
        for n, b in either.named_buffers():
            assert torch.equal(b, before[n])
    if kind == "hooked":  # the reference's copies of a network under way can't be made
        return
    # in a plain loop, with only the changing modules in eval mode
    mode = TrainMode.of(model, case.train)
    expected = plain_run(model, case.train, case.test, data[3], 0, kept_in_eval=mode.kept_in_eval)[0]
    torch.testing.assert_close(whole.full_losses[0], expected)


def test_only_the_module_that_changes_buffers_is_kept_in_eval_mode() -> None:
    case = CASES["mlp_classification"]()
    mode = TrainMode.of(FinalModel(nn.Sequential(Normalised(), nn.Identity()), cross_entropy), case.train)
    assert mode == TrainMode(("0",), stochastic=True, only_masks=True)
    assert TrainMode.of(CASES["conv_net"]().final_model, CASES["conv_net"]().train) == TrainMode()
    inside = TrainMode.of(FinalModel(Inside(), cross_entropy), case.train)
    assert set(inside.kept_in_eval) == {"inner", ""}


def test_a_power_iteration_that_has_converged_is_noticed_too() -> None:
    case = CASES["mlp_classification"]()
    torch.manual_seed(0)
    network = spectral(torch.nn.utils.parametrizations.spectral_norm).train()
    for _ in range(300):
        network(case.train.inputs)
    mode = TrainMode.of(FinalModel(network, cross_entropy), case.train)
    assert mode.kept_in_eval == ("0.parametrizations.weight.0", "2.parametrizations.weight.0")


class Unvectorisable(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 3, dtype=torch.float64), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer(x)) * (1.0 if float(x.detach().sum()) < math.inf else 2.0)


class Noisy(Unvectorisable):
    """Draws other numbers than dropout's masks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.1 * torch.randn(3).to(x) if self.training else 0.0)


class Checkpointed(Unvectorisable):
    """Draws its masks again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [Unvectorisable, Noisy, Checkpointed])
def test_masks_have_a_generator_of_their_own_where_nothing_else_is_drawn(kind: type[Unvectorisable]) -> None:
    case = CASES["mlp_classification"]()
    model = FinalModel(kind(0.4), cross_entropy)
    assert TrainMode.of(model, case.train).only_masks == (kind is Unvectorisable)
    assert not TrainMode.of(FinalModel(kind(0.0), cross_entropy), case.train).only_masks
    if kind is Checkpointed:  # its backward pass is not of the replica's parameters, and says so
        return
    protocol = Protocol(batch_size=9, epochs=1, leave_out="mask", lr=0.1, dtype="float64")
    found = further_train(model, case.train, case.test, protocol, [3], [0, 7])
    expected = plain_sensitivity(model, case.train, case.test, protocol, [3], [[0], [7]])
    torch.testing.assert_close(found.full_losses, expected["full_losses"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.raw.double(), expected["raw"], rtol=0, atol=1e-7)


class DroppingBelow(nn.Module):
    """A frozen part with dropout, of two modules and a mask between them, below what is trained."""

    def __init__(self, between: float = 0.0) -> None:
        super().__init__()
        self.below = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4)).double()
        self.second, self.layer = nn.Linear(6, 4).double(), nn.Linear(4, 3).double()
        self.dropout, self.between = nn.Dropout(0.2), between

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.below(x).tanh(), self.between, self.training)
        assert float(hidden.detach().abs().max()) < 10  # can't be vectorised
        return self.dropout(self.layer(self.second(hidden) + x))


@pytest.mark.parametrize("rule", ["mask", "every_batch", "shift"])
@pytest.mark.parametrize("between", [0.0, 0.3])
def test_a_frozen_part_with_dropout_is_called_once_for_runs_of_a_batch(rule: str, between: float) -> None:
    case = CASES["mlp_classification"]()
    model = FinalModel(DroppingBelow(between), cross_entropy, trainable=("layer*",))
    protocol = Protocol(batch_size=9, epochs=2, leave_out=rule, lr=0.1, dtype="float64")
    setting = Setting.build(model, case.train, case.test, protocol)
    shared = rule != "shift" and not between  # else masks are drawn in another order
    assert setting.once == (("below", "second") if shared else ())
    found = further_train(model, case.train, case.test, protocol, [3], [0, 7, 11])
    expected = plain_sensitivity(model, case.train, case.test, protocol, [3], [[0], [7], [11]])
    torch.testing.assert_close(found.full_losses, expected["full_losses"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.raw.double(), expected["raw"], rtol=0, atol=1e-7)
    alone = further_train(model, case.train, case.test, protocol, [3], [0, 7, 11], chunk=1)
    assert torch.equal(found.raw, alone.raw)


def test_chunks_run_side_by_side_unless_copies_of_a_network_may_share_state() -> None:
    case, before = CASES["mlp_classification"](), torch.get_num_threads()
    hooked = Unvectorisable()
    hooked.layer.register_forward_hook(lambda *_: None)

    def workers(network: nn.Module) -> int:
        model = FinalModel(network, cross_entropy)
        return worker_threads(Setting.build(model, case.train, case.test, Protocol(epochs=1)))

    torch.set_num_threads(3)
    try:
        assert [workers(WithDropout()), workers(Unvectorisable())] == [3, 3]
        assert [workers(Unvectorisable(0.5)), workers(Noisy()), workers(hooked)] == [3, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_a_network_whose_buffers_change_in_eval_mode_is_refused() -> None:
    case = CASES["mlp_classification"]()
    model = FinalModel(Normalised(always=True), cross_entropy)
    with pytest.raises(InputError, match=r"model.network: a forward pass in eval mode changes mean"):
        further_train(model, case.train, case.test, Protocol(batch_size=5, epochs=1), [0], [1])


def test_the_callers_random_state_is_left_alone() -> None:
    data = CASES["mlp_classification"]()
    model = FinalModel(WithDropout(), cross_entropy)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    further_train(model, data.train, data.test, Protocol(batch_size=9, epochs=1), [0], [1])
    assert torch.equal(torch.rand(3), expected)


class FromDict(nn.Module):
    """Takes its inputs by name and removes them from the dict, as some tokenizer-fed models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 6)
        self.pooler = nn.Linear(4, 4)  # gets no gradient

    def forward(self, **inputs: Tensor) -> Tensor:
        ids, mask = inputs.pop("ids"), inputs.pop("mask")
        return self.head((self.embedding(ids) * mask[..., None]).sum(1))


def dict_case() -> Case:
    torch.manual_seed(0)
    ids, targets = torch.randint(7, (17, 5)), torch.randint(6, (17,))
    inputs = {"ids": ids, "mask": (ids > 0).double()}
    whole = Instances(inputs, targets)
    return Case("dict", FinalModel(FromDict().double(), cross_entropy), whole[:13], whole[13:])


def test_inputs_by_name_survive_two_epochs_and_unused_parameters_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case, protocol = dict_case(), Protocol(batch_size=5, epochs=2, lr=0.1, dtype="float64")
    with caplog.at_level(logging.INFO):
        found = further_train(case.final_model, case.train, case.test, protocol, [0], [1, 7])
    full = plain_run(case.final_model, case.train, case.test, protocol, 0)[0]
    torch.testing.assert_close(found.full_losses[0], full)
    assert "pooler.weight" in caplog.text
    (trajectory,) = full_runs(case.final_model, case.train, protocol, [0])
    for name, p in case.final_model.parameters().items():
        assert torch.equal(trajectory.parameters[-1][name], p) == name.startswith("pooler")


def test_every_run_moves_its_parameters() -> None:
    case = CASES["mlp_regression"]()
    protocol = Protocol(batch_size=5, epochs=2)
    found = further_train(case.final_model, case.train, case.test, protocol, range(4), range(6), chunk=2)
    assert (found.distance > 0).all()
    assert (found.distance_full > 0).all()
    assert len(found.distance_full.unique()) == found.distance_full.numel(), "each seed has its own order"


@pytest.mark.parametrize("name", CASES)
def test_the_users_model_is_unchanged_also_after_an_error(name: str) -> None:
    case = CASES[name]()
    network = case.final_model.network
    before = {n: t.clone() for n, t in network.state_dict().items()}
    modes = [(m.training, [p.requires_grad for p in m.parameters()]) for m in network.modules()]
    data = (case.final_model, case.train, case.test)
    further_train(*data, Protocol(batch_size=5, epochs=1), [0], [1])

    class Stop(pl.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        further_train(*data, Protocol(batch_size=5, epochs=1), [0], [1], trainer={"callbacks": [Stop()]})
    for n, t in network.state_dict().items():
        assert torch.equal(t, before[n])
    assert modes == [(m.training, [p.requires_grad for p in m.parameters()]) for m in network.modules()]


def test_batch_statistics_stay_those_of_the_final_model() -> None:
    case = CASES["conv_net"]()
    setting = Setting.build(case.final_model, case.train, case.test, Protocol(batch_size=5, epochs=1))
    chunk = Chunk(setting, [Replica(0), Replica(1)])
    chunk.advance(3)
    for name, buffer in case.final_model.to(dtype=torch.float32).buffers().items():
        used = chunk.network.buffers[name]  # type: ignore[attr-defined]
        assert torch.equal(used, buffer.expand_as(used))


@pytest.mark.parametrize("rule", ["shift", "mask"])
def test_steps_shared_with_the_full_run_are_taken_once_and_change_nothing(rule: str) -> None:
    n, protocol = 23, Protocol(batch_size=4, steps=6, evaluate_every=1, leave_out=rule, dtype="float64")
    case, removal = CASES["mlp_regression"](), make_rule(protocol, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    for position in (0, 7, 22):
        i = order[position]
        first = position // 4
        assert shared_steps([Replica(0, (i,))], removal, protocol) == first
        found = further_train(case.final_model, case.train, case.test, protocol, [0], [i])
        changed = found.raw[0, :, :, 0].abs().amax(1)
        assert (changed[:first] == 0).all()
        assert (changed[first:] > 0).all()
    assert shared_steps([Replica(0, (order[22],)), Replica(0, (order[7],))], removal, protocol) == 1
    assert shared_steps([Replica(0, (order[22],)), Replica(1, (order[22],))], removal, protocol) == 0


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_float32_test_losses_would_drown_the_changes_that_float64_ones_show(name: str) -> None:
    """Runs in float32; their losses' changes against those of float64 runs."""
    case = CASES[name]()
    settings = {"batch_size": 5, "epochs": 1, "lr": 1e-4, "leave_out": "mask"}
    data = (case.final_model, case.train, case.test)
    exact = further_train(*data, Protocol(**settings, dtype="float64"), [0], [0, 3, 8]).raw

    def error(evaluation_dtype: str) -> float:
        single = case.to(torch.float32)
        protocol = Protocol(**settings, evaluation_dtype=evaluation_dtype)
        found = further_train(single.final_model, single.train, single.test, protocol, [0], [0, 3, 8]).raw
        return ((found - exact).norm() / exact.norm()).item()

    assert error("float64") < 0.02
    assert error("float64") < error("float32")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stored", [False, True])
def test_trajectories_are_those_of_the_plain_loop(optimizer: str, stored: bool, tmp_path: Path) -> None:
    case = CASES["mlp_classification"]()
    protocol = Protocol(optimizer, batch_size=5, epochs=2, lr=0.01, dtype="float64")
    store = Store(tmp_path) if stored else None
    found = list(full_runs(case.final_model, case.train, protocol, [0, 3], store=store))
    again = list(full_runs(case.final_model, case.train, protocol, [0, 3], store=store))
    for trajectory, other in zip(found, again, strict=True):
        network = plain_run(case.final_model, case.train, case.test, protocol, trajectory.seed)[2]
        assert len(trajectory.parameters) == 3
        for name, p in network.named_parameters():
            torch.testing.assert_close(trajectory.parameters[-1][name], p.detach())
            assert torch.equal(trajectory.parameters[0][name], case.final_model.parameters()[name])
            assert torch.equal(trajectory.parameters[-1][name], other.parameters[-1][name])
        if optimizer == "adam":
            assert trajectory.second_moment is not None
            assert all((m >= 0).all() for m in trajectory.second_moment[-1].values())
            assert all((m == 0).all() for m in trajectory.second_moment[0].values())
        else:
            assert trajectory.second_moment is None


def test_the_bar_counts_replica_steps_and_says_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["mlp_regression"]()
    data = (case.final_model, case.train, case.test, Protocol(batch_size=5, epochs=2))
    further_train(*data, [0], [1, 2, 3], store=Store(tmp_path))

    class Seen(ReplicaProgress):
        def on_train_end(self, trainer: pl.Trainer, module: object) -> None:
            bar = self.train_progress_bar
            totals.append((bar.n, bar.total))
            super().on_train_end(trainer, module)

    totals: list[tuple[float, float | None]] = []
    settings = {"enable_progress_bar": True, "callbacks": [Seen()]}
    further_train(*data, [0], range(1, 8), store=Store(tmp_path), trainer=settings)
    assert totals == [(4 * 10, 4 * 10)]
    shown = capsys.readouterr()
    assert "50% of the runs found in the store" in shown.out + shown.err
    assert "replica-step/s" in shown.out + shown.err


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_full_run_s_second_moment_is_corrected_for_its_start(optimizer: str) -> None:
    """After one step it is the squared gradient of the first batch, after two the weighted mean of two."""
    case, beta = CASES["mlp_regression"](), 0.9
    protocol = Protocol(
        optimizer=optimizer,
        lr=0.01,
        betas=(0.8, beta),
        batch_size=5,
        steps=2,
        evaluate_every=1,
        dtype="float64",
    )
    (run,) = full_runs(case.final_model, case.train, protocol, [3])
    order = torch.randperm(len(case.train), generator=torch.Generator().manual_seed(3))
    squares = []
    for step in range(2):
        network = copy.deepcopy(case.final_model.network).requires_grad_(True)
        network.load_state_dict(run.parameters[step], strict=False)
        batch = case.train[order[5 * step : 5 * step + 5]]
        case.final_model.loss(network(batch.inputs), batch.targets).mean().backward()
        squares.append({n: p.grad.square() for n, p in network.named_parameters() if p.grad is not None})
    assert run.second_moment is not None
    for name, moment in run.second_moment[1].items():
        torch.testing.assert_close(moment.double(), squares[0][name], rtol=1e-5, atol=1e-12)
    for name, moment in run.second_moment[2].items():
        expected = (beta * squares[0][name] + squares[1][name]) / (1 + beta)
        torch.testing.assert_close(moment.double(), expected, rtol=1e-5, atol=1e-12)
