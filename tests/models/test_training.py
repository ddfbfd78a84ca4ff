"""The final model: trained as a plain loop would, cached by content, read back from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from fimo.cost import Cost
from fimo.data.bundled import BundledData
from fimo.data.custom import CustomData
from fimo.data.instances import Instances
from fimo.models.checkpoint import load_checkpoint
from fimo.models.final_model import FinalModel, fitting_batch
from fimo.models.keep_best import KeepBest
from fimo.models.lightning_module import FinalModelModule
from fimo.models.losses import cross_entropy, language_modelling, mean_squared_error
from fimo.models.mlp import mlp
from fimo.models.training import Quality, constant_loss, quality, save_checkpoint, train_final_model
from fimo.store.files import Store


def trainer(epochs: int = 2) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


class Decaying(FinalModelModule):
    """Trains for one epoch and spoils its network before every other."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            for p in self.network.parameters():
                p.data.mul_(10.0)


def diabetes() -> BundledData:
    data = BundledData("diabetes", batch_size=64)
    data.setup()
    return data


def module(seed: int = 0) -> FinalModelModule:
    torch.manual_seed(seed)
    return FinalModelModule(mlp(10, 1, (8,)), mean_squared_error, "regression", 1, lr=0.05)


def test_training_equals_a_plain_loop(tmp_path: Path) -> None:
    data, trained = diabetes(), module()
    train_final_model(trained, data, trainer(), Store(tmp_path), {"m": 1}, 0, Cost("final_model"))
    plain = module().network
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    torch.manual_seed(0)
    loader = data.train_dataloader()
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            F.mse_loss(plain(batch.inputs), batch.targets).backward()
            optimizer.step()
    for a, b in zip(trained.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_configuration_is_read_from_the_store_and_another_is_not(tmp_path: Path) -> None:
    data, store = diabetes(), Store(tmp_path)
    first, second, third = module(), module(), module()
    costs = [Cost("final_model") for _ in range(3)]
    train_final_model(first, data, trainer(), store, {"lr": 1}, 0, costs[0])
    train_final_model(second, data, trainer(), store, {"lr": 1}, 0, costs[1])
    train_final_model(third, data, trainer(), store, {"lr": 2}, 0, costs[2])
    assert [c.reused for c in costs] == [0.0, 1.0, 0.0]
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_written_checkpoint_is_read_back_without_executing_code(tmp_path: Path) -> None:
    trained, fresh = module(1), module(2)
    save_checkpoint(trained, trainer(), tmp_path / "final_model.ckpt")
    load_checkpoint(fresh.network, tmp_path / "final_model.ckpt")
    x = torch.randn(3, 10)
    assert torch.equal(trained.network(x), fresh.network(x))


def test_quality_compares_with_the_best_constant_prediction() -> None:
    data = diabetes()
    final_model = FinalModel(module().network, mean_squared_error)
    measured = quality(final_model, data)
    expected = (data.test.targets - data.train.targets.mean()).square().mean()
    assert abs(measured.baseline_loss - expected) < 1e-5
    assert measured.train_accuracy is None
    shown = Quality(0.12345, 0.2, 0.9)
    assert str(shown) == "loss 0.1235 on training and 0.2 on test instances (the best constant's: 0.9)"
    assert str(Quality(0.1, 0.2, 0.9, 0.75, 0.5)).endswith(", accuracy 0.750 and 0.500")
    cancer = BundledData("breast_cancer")
    cancer.setup()
    share = torch.bincount(cancer.train.targets) / len(cancer.train)
    loss = -share.log()[cancer.test.targets].mean()
    assert abs(constant_loss(FinalModel(mlp(30, 2), cross_entropy), cancer) - loss) < 1e-5


def test_the_best_epoch_can_be_kept(tmp_path: Path) -> None:
    def trained(keep: bool, epochs: int) -> FinalModelModule:
        torch.manual_seed(0)
        found = Decaying(mlp(10, 1, (8,)), mean_squared_error, "regression", 1, lr=0.05)
        runs = trainer(epochs)
        runs.callbacks.extend([KeepBest()] if keep else [])  # type: ignore[attr-defined]
        data = diabetes()
        data.hold_out(40)
        train_final_model(found, data, runs, Store(tmp_path), {"epochs": epochs}, 0, Cost("final_model"))
        return found

    best, first, last = trained(True, 3), trained(False, 1), trained(False, 3)
    for a, b, c in zip(*(m.network.parameters() for m in (best, first, last)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_a_language_models_baseline_is_the_tokens_frequencies() -> None:
    targets = torch.tensor([[0, 1, 1, -100], [2, 1, -100, -100], [1, 1, 0, 2]])
    inputs = {"input_ids": torch.zeros(3, 4, dtype=torch.int64)}
    everything = Instances(inputs, targets)
    data = CustomData(everything[:2], everything[2:], task="language_modelling", class_names=["a", "b", "c"])
    data.setup()
    share = torch.tensor([1, 3, 1]) / 5
    expected = -share.log()[targets[2]].mean()
    assert abs(constant_loss(FinalModel(mlp(4, 3), language_modelling), data) - expected) < 1e-5


def test_batches_that_are_evaluated_at_once_suit_the_inputs() -> None:
    def instances(x: torch.Tensor) -> Instances:
        return Instances(x, torch.zeros(len(x), dtype=torch.int64))

    rows, pictures = torch.zeros(1, 30), torch.zeros(1, 3, 32, 32)
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    sizes = [fitting_batch(instances(x)) for x in (rows, pictures, tokens)]
    assert sizes[0] == 4096
    assert sizes[0] > sizes[1] > sizes[2] >= 64
    network, x = mlp(30, 3), torch.randn(9, 30)
    model = FinalModel(network, cross_entropy)
    torch.testing.assert_close(model.outputs(instances(x), 2), model.outputs(instances(x)))
