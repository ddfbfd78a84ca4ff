"""A LightningModule of the user's own trains the final model, and says by which loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fimo.data.bundled import BundledData
from fimo.errors import InputError
from fimo.models.losses import LOSSES, cross_entropy, huber, mean_squared_error
from fimo.models.own_training import loss_of, trains_itself
from tests.in_process import commands

CONF = Path(__file__).parents[1] / "conf"
MINE = '''
import pytorch_lightning as pl
import torch
from torch.nn import functional as F


class Lit(pl.LightningModule):
    """Squared errors of a small network, by RMSprop with a schedule."""

    def __init__(self, inputs, decay=0.0):
        super().__init__()
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(torch.nn.Linear(inputs, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        self.decay = decay

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self(x), y) + self.decay * sum(p.square().sum() for p in self.parameters())
        self.log("my_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.mse_loss(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.RMSprop(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def squared(outputs, targets):
    return (outputs - targets).square().flatten(1).mean(1)
'''
SMALL = [
    "model=custom", "model.network._target_=mine_lit.Lit", "+model.network.inputs=10", "trainer.max_epochs=4",
    "model.accept_poor=true", "further_training.seeds=2", "further_training.left_out=3",
    "further_training.epochs=1", "report=false", "logger=none", "+method=graddot",
]  # fmt: skip


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine_lit.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine_lit  # type: ignore[import-not-found]

    yield mine_lit
    del sys.modules["mine_lit"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    return commands(CONF, SMALL, tmp_path, monkeypatch, capsys)


def diabetes() -> BundledData:
    data = BundledData("diabetes")
    data.setup()
    return data


def plainly_trained(mine, epochs: int) -> torch.nn.Module:
    """The module's training as a plain loop, with the run's seeds and batches."""
    torch.manual_seed(0)
    module, data = mine.Lit(10), diabetes()
    torch.manual_seed(0)
    (optimizer,), (schedule,) = module.configure_optimizers()
    loader = data.train_dataloader()
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            F.mse_loss(module(batch.inputs), batch.targets).backward()
            optimizer.step()
        schedule.step()
    return module


def test_its_own_step_optimizer_and_schedule_train_the_final_model(mine, run) -> None:
    folder = run("own")
    assert isinstance(folder, Path), folder
    found = torch.load(folder / "final_model.ckpt", weights_only=True)["state_dict"]
    for name, value in plainly_trained(mine, 4).state_dict().items():
        assert torch.allclose(found[f"network.{name}"], value, atol=1e-6), name
    again = run("again")  # read from the store
    assert isinstance(again, Path), again
    assert "the final model is in the store" not in (again / "fimo.log").read_text()
    other = run("other", "model.training=loss")
    assert isinstance(other, Path)
    ours = torch.load(other / "final_model.ckpt", weights_only=True)["state_dict"]
    assert not torch.allclose(ours["network.layers.0.weight"], found["network.layers.0.weight"], atol=1e-3)


def test_its_validation_step_chooses_the_epoch(mine, run) -> None:
    assert isinstance(run("best", "trainer.keep=best", "dataset.validation_size=0.1"), Path)


def test_a_loss_that_can_not_be_told_is_asked_for(mine, run) -> None:
    said = run("decay", "+model.network.decay=0.1")
    assert str(said).startswith("error: model.loss: training_step gives ")
    assert "name the loss of each instance" in str(said)
    assert isinstance(run("named", "+model.network.decay=0.1", "model.loss=mine_lit.squared"), Path)
    assert "error: model.training: own needs a LightningModule" in str(
        run(
            "none",
            "model.network._target_=fimo.models.mlp.mlp",
            "+model.network.outputs=1",
            "model.training=own",
        )
    )


def test_the_loss_is_the_one_whose_mean_the_step_is(mine) -> None:
    train = diabetes().train
    torch.manual_seed(0)
    module = mine.Lit(10)
    assert trains_itself(module)
    assert not trains_itself(torch.nn.Linear(2, 1))
    assert loss_of(module, mean_squared_error, LOSSES, train) is mean_squared_error
    assert loss_of(module, cross_entropy, LOSSES, train) is mean_squared_error
    module.training_step = lambda batch, _: F.huber_loss(module(batch[0]), batch[1])
    assert loss_of(module, mean_squared_error, {"huber": huber}, train) is huber
    module.training_step = lambda batch, _: F.mse_loss(module(batch[0]).squeeze(), batch[1])  # broadcast
    with pytest.raises(InputError, match=r"targets are \[n, 1\]"):
        loss_of(module, mean_squared_error, LOSSES, train)
