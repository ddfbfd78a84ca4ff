"""Networks that take a batch's rows in another order on their way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.recording import recorder_of_sums
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.further_training import further_train
from fimo.methods.embedding import representations
from fimo.models.final_model import FinalModel
from fimo.models.frozen import trained_part
from fimo.models.losses import cross_entropy
from fimo.models.row_order import RowMoves
from tests.reference import attribution as dense
from tests.reference.further_training import plain_sensitivity

PADDING = 1


class Words(nn.Module):
    """A mean of words, and layers on it; texts may be sorted by length before, and back after."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.token, self.mix, self.head = nn.Embedding(9, 4, PADDING), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = (x != PADDING).sum(1).argsort(descending=True, stable=True)
        if self.how == "plain":
            return self.body(x)
        if self.how == "marked":  # the token before each marker; as many as instances, but not one of each
            at = (x == 8).nonzero()
            found = self.mix(self.token(x[at[:, 0], at[:, 1] - 1])).tanh()
            sums = torch.zeros(len(x), 4, dtype=found.dtype).index_add(0, at[:, 0], found)
            return self.head(sums)
        if self.how == "packed":
            kept = [x[k][x[k] != PADDING] for k in order.tolist()]
            packed = nn.utils.rnn.pack_sequence([self.token(one) for one in kept])
            means = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0].sum(1)
            return self.head(self.mix(means).tanh())[order.argsort()]
        moved = {"sorted": x[order], "stacked": torch.stack([x[k] for k in order.tolist()])}[self.how]
        return self.body(moved)[order.argsort()]

    def body(self, x: Tensor) -> Tensor:
        there = (x != PADDING)[..., None]
        mean = (self.token(x) * there).sum(1) / there.sum(1)
        return self.head(self.mix(mean).tanh())


def texts() -> Instances:
    """Of which the first three are of one length, so that a trial on them finds all in order."""
    torch.manual_seed(0)
    x = torch.randint(2, 8, (12, 6))
    length = torch.tensor([6, 6, 6, 2, 5, 3, 1, 4, 6, 2, 3, 5])
    x[torch.arange(6) >= length[:, None]] = PADDING
    x[[0, 1, 2, 2, *range(4, 12)], [3, 2, 1, 4, *[5] * 8]] = 8  # two markers in a text, none in the next
    return Instances(x, torch.randint(2, (12,)))


SORTING = ("sorted", "stacked", "packed", "marked")


@pytest.mark.parametrize("how", ["plain", *SORTING])
def test_what_may_move_rows_is_noted_and_gradients_are_each_instance_s(how: str) -> None:
    data = texts()
    model = FinalModel(Words(how).double(), cross_entropy, accept_poor=True)
    with RowMoves(model.network, data.inputs) as moves:
        model.network(data.inputs)
    assert moves.noted == (how != "plain")
    rows = InstanceGradients(model).losses(data).dense()[:, 0]
    torch.testing.assert_close(rows, dense.instance_gradients(model, data), rtol=1e-9, atol=1e-13)


class Masked(Words):
    """The same, given a tokenizer's output."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids)


@pytest.mark.parametrize("how", ["plain", "sorted"])
def test_a_mask_says_which_positions_count_only_where_rows_are_in_its_order(how: str) -> None:
    data = texts()
    assert isinstance(data.inputs, Tensor)
    masked = {"input_ids": data.inputs, "attention_mask": (data.inputs != PADDING).long()}
    recorder = recorder_of_sums(
        FinalModel(Masked(how).double(), cross_entropy), Instances(masked, data.targets)
    )
    assert recorder is not None
    rows = recorder.rows(Instances(masked, data.targets), lambda outputs: torch.ones_like(outputs)[:, None])
    assert (rows.mask is None) == (how == "sorted")


@pytest.mark.parametrize("how", SORTING[:3])
def test_representations_are_each_instance_s(how: str) -> None:
    data = texts()
    model = FinalModel(Words(how).double(), cross_entropy)
    alone = torch.cat([representations(model, one) for one in data.batches(1)])
    torch.testing.assert_close(representations(model, data), alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", ["plain", *SORTING])
def test_a_head_after_frozen_layers_is_further_trained_as_with_them(how: str) -> None:
    data = texts()
    model = FinalModel(Words(how).double(), cross_entropy, trainable=("head*",), accept_poor=True)
    protocol = Protocol(lr=0.3, batch_size=5, epochs=2, dtype="float64", leave_out="mask")
    found = further_train(model, data[:9], data[9:], protocol, [0], [1, 4])
    plain = plain_sensitivity(model, data[:9], data[9:], protocol, [0], [[1], [4]])
    torch.testing.assert_close(found.raw.double(), plain["raw"], rtol=1e-6, atol=1e-10)


def test_a_frozen_encoder_that_returns_rows_in_their_order_is_cut_off() -> None:
    data = texts()
    network = nn.Sequential(Words("sorted"), nn.Tanh(), nn.Linear(2, 2)).double()
    model = FinalModel(network, cross_entropy, trainable=("2.*",))
    part, (entered,) = trained_part(model, data)
    assert part is not model
    torch.testing.assert_close(part.network(entered.inputs), network(data.inputs), rtol=1e-12, atol=1e-14)


def test_frozen_layers_make_no_duplicates_and_keep_those_that_there_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3).double()
    x[:6, 0] = -9.0  # the unit of the frozen layer is dead
    x[11], y = x[10], torch.zeros(12, dtype=torch.int64)
    frozen = nn.Linear(3, 1)
    frozen.load_state_dict({"weight": torch.tensor([[1.0, 0.1, 0.1]]), "bias": torch.zeros(1)})
    network = nn.Sequential(frozen, nn.ReLU(), nn.Linear(1, 2)).double()
    model = FinalModel(network, cross_entropy, trainable=("2.*",), accept_poor=True)
    protocol = Protocol(lr=0.3, batch_size=5, epochs=2, dtype="float64", leave_out="with_duplicates")
    found = further_train(model, Instances(x, y), Instances(x, y), protocol, [0], [1, 10])
    plain = plain_sensitivity(model, Instances(x, y), Instances(x, y), protocol, [0], [[1], [10, 11]])
    torch.testing.assert_close(found.raw.double(), plain["raw"], rtol=1e-6, atol=1e-10)
