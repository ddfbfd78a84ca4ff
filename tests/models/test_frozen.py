"""The frozen part computed once: same outputs, gradients, further training and scores."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fimo.data.custom import CustomData
from fimo.data.instances import Instances
from fimo.further_training import Protocol, further_train
from fimo.methods.embedding import EmbeddingSimilarity
from fimo.methods.graddot import GradDot
from fimo.models.final_model import FinalModel
from fimo.models.frozen import without_frozen_part
from fimo.models.losses import cross_entropy, language_modelling
from fimo.models.resnet9 import resnet9
from fimo.store.description import describe
from fimo.store.files import Store
from tests.models.folders import save_bert
from tests.reference.further_training import plain_sensitivity


def images() -> CustomData:
    torch.manual_seed(0)
    x, y = torch.randn(10, 3, 8, 8).double(), torch.randint(3, (10,))
    return loaded(Instances(x[:7], y[:7]), Instances(x[7:], y[7:]))


def sentences() -> CustomData:
    torch.manual_seed(0)
    mask = (torch.arange(6) < torch.randint(2, 6, (10,))[:, None]).long()
    inputs = {"input_ids": torch.randint(4, 12, (10, 6)) * mask, "attention_mask": mask}
    everything = Instances(inputs, torch.randint(3, (10,)))
    return loaded(everything[:7], everything[7:])


def loaded(train: Instances, test: Instances) -> CustomData:
    data = CustomData(train, test, class_names=["a", "b", "c"])
    data.setup()
    return data


def network(name: str, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet9":
        found = resnet9(3, width=2).double()
        found(torch.randn(20, 3, 8, 8).double())
        return found
    pytest.importorskip("transformers", reason="transformers is not installed")
    from fimo.models.huggingface import text_classifier

    if name == "own":
        return text_classifier(str(save_bert(folder, classes=3)), 12, 3, head="own", dropout=0.0).double()
    return text_classifier(str(save_bert(folder)), 12, 3, pooling=name, dropout=0.0).double()


CASES = [
    ("resnet9", ("head*",)),
    ("resnet9", ("layer3*", "head*")),
    ("first", ("head*",)),
    ("mean", ("head*",)),
    ("mean", ("*layer.1.*", "head*")),
    ("first", ("*layer.1.output*",)),
    ("own", ("model.classifier*",)),
    ("own", ("*layer.1.*", "model.classifier*")),
    ("own", ("*layer.1.output*",)),
]


@pytest.mark.parametrize(("name", "trainable"), CASES)
def test_the_trained_part_alone_gives_the_whole_networks_results(
    tmp_path: Path, name: str, trainable: tuple[str, ...]
) -> None:
    data = images() if name == "resnet9" else sentences()
    whole = FinalModel(network(name, tmp_path), cross_entropy, trainable=trainable)
    part, seen = without_frozen_part(whole, data)
    assert part is not whole
    assert list(part.parameters()) == list(whole.parameters())
    assert sum(p.numel() for p in part.network.parameters()) < sum(
        p.numel() for p in whole.network.parameters()
    )
    same_results(part, whole, seen, data)


def same_results(part: FinalModel, whole: FinalModel, seen: CustomData, data: CustomData) -> None:
    assert part is not whole
    assert list(part.parameters()) == list(whole.parameters())
    torch.testing.assert_close(part.outputs(seen.test), whole.outputs(data.test), rtol=1e-8, atol=1e-10)
    ours = GradDot().attribute(part, seen.train, seen.test).values
    torch.testing.assert_close(
        ours, GradDot().attribute(whole, data.train, data.test).values, rtol=1e-7, atol=1e-10
    )
    protocol = Protocol(lr=0.05, batch_size=3, epochs=1, dtype="float64")
    raw = [
        further_train(model, d.train, d.test, protocol, [0], [1, 4]).raw
        for model, d in ((part, seen), (whole, data))
    ]
    torch.testing.assert_close(raw[0], raw[1], rtol=1e-4, atol=1e-8)


def test_representations_are_the_same() -> None:
    data = images()
    whole = FinalModel(network("resnet9", Path()), cross_entropy, trainable=("head*",))
    part, seen = without_frozen_part(whole, data)
    ours, theirs = (
        EmbeddingSimilarity().attribute(m, d.train, d.test).values for m, d in ((part, seen), (whole, data))
    )
    torch.testing.assert_close(ours, theirs)


class Doubled(nn.Module):
    """A network whose last layer is used twice, so that it is not the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(192, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.last(self.body(x.flatten(1))).tanh())


class Skipping(nn.Module):
    """Frozen values that skip the trained layer, positions that all instances share, and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 5), nn.GRU(5, 5, batch_first=True)
        self.place = nn.Embedding(3, 5)
        self.middle, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        place = self.place(torch.arange(3))
        early = self.first(x.flatten(2)).relu()
        late, _ = self.second(early + place)
        trained = self.middle(late * x.flatten(2).mean(-1, keepdim=True))
        return self.last((trained + early).tanh() + place).mean(1)


@pytest.mark.parametrize(
    ("net", "trainable"),
    [(Doubled(), ("last*",)), (Skipping(), ("middle*",)), (Skipping(), ("last*",))],
)
def test_any_network_is_cut_where_its_first_trained_module_is_called(
    net: nn.Module, trainable: tuple[str, ...]
) -> None:
    data = images()
    whole = FinalModel(net.double(), cross_entropy, trainable=trainable)
    part, seen = without_frozen_part(whole, data)
    same_results(part, whole, seen, data)
    assert part.network.get_submodule("body" if isinstance(net, Doubled) else "first").values is None
    copied = pickle.loads(pickle.dumps(part))  # as for several devices
    torch.testing.assert_close(copied.outputs(seen.test), part.outputs(seen.test), rtol=0, atol=0)
    assert describe(part.network, "network") == describe(copied.network, "network")


class Hidden(nn.Module):
    """A trained parameter that is used before a frozen layer, outside of the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.layer, self.last = nn.Linear(192, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x.flatten(1) @ self.store.weight.T))


class Owning(nn.Module):
    """A trained parameter of the whole network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(())), nn.Linear(192, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1) * self.scale)


@pytest.mark.parametrize(("net", "trainable"), [(Hidden(), ("store.weight",)), (Owning(), ("scale",))])
def test_what_a_trained_parameter_changes_is_not_cut_off(net: nn.Module, trainable: tuple[str, ...]) -> None:
    whole = FinalModel(net.double(), cross_entropy, trainable=trainable)
    assert without_frozen_part(whole, images())[0] is whole


def test_a_language_model_is_cut_before_its_first_trained_block() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from fimo.models.huggingface import causal_lm

    torch.manual_seed(0)
    tokens = torch.randint(11, (10, 7))
    everything = Instances({"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous())
    data = loaded(everything[:7], everything[7:])
    net = causal_lm(11, width=8, layers=3, heads=2, positions=8).double()
    whole = FinalModel(net, language_modelling, trainable=("*h.2.*",))
    part, seen = without_frozen_part(whole, data)
    assert sum(p.numel() for p in part.network.parameters()) < 0.6 * sum(p.numel() for p in net.parameters())
    same_results(part, whole, seen, data)


def test_a_whole_model_in_python_is_further_trained_by_its_trained_part(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = images()
    whole = FinalModel(Skipping().double(), cross_entropy, trainable=("middle*",), accept_poor=True)
    protocol = Protocol(lr=0.05, batch_size=3, epochs=1, dtype="float64")
    with caplog.at_level("INFO"):
        found = further_train(whole, data.train, data.test, protocol, [0], [1, 4])
    assert "frozen parameters before the first trained layer are evaluated once" in caplog.text
    plain = plain_sensitivity(whole, data.train, data.test, protocol, [0], [[1], [4]])
    torch.testing.assert_close(found.full_losses, plain["full_losses"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.raw.double(), plain["raw"], rtol=1e-5, atol=1e-9)


def test_a_network_is_left_whole_where_all_is_trained_or_the_frozen_part_draws() -> None:
    data = images()
    everything = FinalModel(network("resnet9", Path()), cross_entropy)
    assert without_frozen_part(everything, data) == (everything, data)
    drawing = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    dropped = FinalModel(drawing, cross_entropy, trainable=("3.*",))
    assert without_frozen_part(dropped, data)[0] is dropped


class DrawingFunction(nn.Module):
    """Dropout that is no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


def test_a_frozen_part_with_dropout_as_a_function_is_left_whole() -> None:
    drawing = nn.Sequential(nn.Flatten(), DrawingFunction(), nn.Linear(4, 3)).double()
    model = FinalModel(drawing, cross_entropy, trainable=("2.*",))
    assert without_frozen_part(model, images())[0] is model


class Clipping(nn.Module):
    """Outputs are cut where some are large: in the row 18 alone, and in what training makes of others."""

    def __init__(self, looks: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head, self.looks = nn.Linear(4, 6), nn.Linear(6, 3), looks
        self.head.weight.data *= 3

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.head(self.a(x).tanh())
        if self.looks == "at outputs":
            return outputs.clamp(-2, 2) if outputs.detach().abs().max() > 2 else outputs
        return outputs.clamp(-2, 2) if x.detach().abs().max() > 9 else outputs


@pytest.mark.parametrize("looks", ["at outputs", "at inputs"])
def test_what_some_instances_alone_do_with_a_trained_heads_outputs_is_done(looks: str) -> None:
    torch.manual_seed(1)
    data = Instances(torch.randn(40, 4).double(), torch.randint(0, 3, (40,)))
    data.inputs[18] *= 12
    whole = FinalModel(Clipping(looks).double(), cross_entropy, trainable=("head*",), accept_poor=True)
    protocol = Protocol(lr=0.1, batch_size=8, epochs=2, dtype="float64", leave_out="mask")
    found = further_train(whole, data, data[:4], protocol, [0], [18, 1])
    plain = plain_sensitivity(whole, data, data[:4], protocol, [0], [[18], [1]])
    torch.testing.assert_close(found.raw.double(), plain["raw"], rtol=1e-5, atol=1e-7)


def test_what_is_in_the_store_is_read_without_evaluating_the_frozen_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, store = images(), Store(tmp_path)
    whole = FinalModel(Skipping().double(), cross_entropy, trainable=("middle*",), accept_poor=True)
    protocol = Protocol(lr=0.05, batch_size=3, epochs=1)
    found = further_train(whole, data.train, data.test, protocol, [0], [1, 4], store=store)
    with caplog.at_level("INFO"):
        again = further_train(whole, data.train, data.test, protocol, [0], [1, 4], store=store)
    assert "evaluated once" not in caplog.text
    assert torch.equal(found.raw, again.raw)
