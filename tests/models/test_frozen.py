"""The frozen part computed once: same outputs, gradients, further training and scores."""

from __future__ import annotations

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
from fimo.models.losses import cross_entropy
from fimo.models.resnet9 import resnet9
from tests.models.folders import save_bert


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.last(self.body(x.flatten(1))).tanh())


def test_a_layer_that_is_not_simply_the_last_is_not_cut_off() -> None:
    whole = FinalModel(Doubled().double(), cross_entropy, trainable=("last*",))
    assert without_frozen_part(whole, images())[0] is whole


def test_a_network_is_left_whole_where_all_is_trained_or_the_frozen_part_draws() -> None:
    data = images()
    everything = FinalModel(network("resnet9", Path()), cross_entropy)
    assert without_frozen_part(everything, data) == (everything, data)
    drawing = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    dropped = FinalModel(drawing, cross_entropy, trainable=("3.*",))
    assert without_frozen_part(dropped, data)[0] is dropped
    unknown = FinalModel(nn.ModuleList([drawing])[0], cross_entropy, trainable=("1.*",))
    assert without_frozen_part(unknown, data)[0] is unknown


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
