"""Batches of several lengths in parts: the same sums, fewer columns of padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting
from fimo.engine.replicas import Replica
from fimo.further_training import Protocol
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy
from fimo.models.padding import by_length


class Trimming(nn.Module):
    """The mean of token embeddings, through a layer; notes the widths that it is called with."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(20, 4), nn.Linear(4, 3)
        self.dropout, self.trims = nn.Dropout(dropout), True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        width = int(attention_mask.sum(1).max())
        widths.append(width)
        mask = attention_mask[:, :width, None].double()
        tokens = self.dropout(self.embedding(input_ids[:, :width]).tanh() * mask)
        return self.layer(tokens.sum(1) / mask.sum(1))


widths: list[int] = []


def sentences(count: int) -> Instances:
    torch.manual_seed(0)
    mask = (torch.arange(12) < torch.randint(1, 13, (count,))[:, None]).long()
    inputs = {"input_ids": torch.randint(20, (count, 12)) * mask, "attention_mask": mask}
    return Instances(inputs, torch.randint(3, (count,)))


def test_parts_hold_all_instances_by_length_and_equal_lengths_are_one_part() -> None:
    net, data = Trimming(), sentences(21)
    assert isinstance(data.inputs, dict)
    lengths = data.inputs["attention_mask"].sum(1)
    parts = by_length(net, data.inputs)
    assert torch.cat(parts).sort().values.tolist() == list(range(21))
    assert len(parts) > 1
    for shorter, longer in itertools.pairwise(parts):
        assert lengths[shorter].max() <= lengths[longer].min()
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    equal = {**data.inputs, "attention_mask": torch.ones(21, 12, dtype=torch.long)}
    assert [p.tolist() for p in by_length(net, equal)] == [list(range(21))]
    assert len(by_length(nn.Linear(2, 2), data.inputs)) == 1
    assert len(by_length(net, torch.ones(30, 2))) == 1


def test_runs_in_parts_are_those_of_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    data = sentences(60)
    model = FinalModel(Trimming().double(), cross_entropy)
    protocol = Protocol(lr=0.1, batch_size=24, epochs=2, dtype="float64", leave_out="mask")
    found, calls = [], []
    for fewest in (100, 8):
        monkeypatch.setattr("fimo.models.padding.FEWEST", fewest)
        widths.clear()
        setting = Setting.build(model, data[:40], data[40:], protocol)
        chunk = Chunk(setting, [Replica(0, (3,)), Replica(0, (7,))])
        chunk.advance(4)
        calls.append(len(widths))
        found.append((chunk.evaluate(), chunk.state()["parameters"]))
    assert setting.engine == "loop"  # whose widths torch.func can't vectorise
    assert calls[1] > calls[0]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)


def test_a_batch_with_dropout_stays_whole() -> None:
    data = sentences(40)
    model = FinalModel(Trimming(0.3).double(), cross_entropy)
    protocol = Protocol(lr=0.1, batch_size=24, epochs=1, leave_out="mask", dtype="float64")
    setting = Setting.build(model, data, data[:4], protocol)
    chunk = Chunk(setting, [Replica(0, (3,)), Replica(0, (7,))])
    widths.clear()
    chunk.advance(1)
    assert len(widths) == 2  # one call for each replica
