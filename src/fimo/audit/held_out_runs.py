"""What the user's own network predicts of rows that it was not trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, chunk_size, worker_threads
from fimo.engine.leave_out import Batch
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica
from fimo.engine.threads import side_by_side
from fimo.errors import InputError
from fimo.models.final_model import FinalModel
from fimo.models.train_mode import seeded

log = logging.getLogger(__name__)

PATIENCE = 3
"""Epochs without a smaller held-out loss after which training ends."""

MOST_EPOCHS = 60


def held_out_outputs(
    model: FinalModel,
    train: Instances,
    further_training: Protocol | None = None,
    folds: int = 5,
    repeats: int = 4,
    seed: int = 0,
) -> Tensor:
    """Return each row's outputs by networks that were trained without it, once for each repeat.

    Each repeat cuts the N rows into folds anew and trains one network without each fold, all of them replicas
    of one batched computation. They start from fresh initial parameters and stop at the epoch whose held-out
    loss is smallest: a network that was trained to the end remembers wrong labels, and one that was stopped
    by the rows that it has not seen has hardly begun to. So their training need not be that of the final
    model, and is not: Adam with a learning rate of 0.001.

    A network that can't be initialised anew (:func:`why_not_fresh`) goes on from the final model by
    ``further_training`` without the fold, to the end. The final model has seen the fold, so that such outputs
    are nearer to the rows' own labels than held-out ones.

    Args:
        further_training: used only then.

    Returns:
        ``[repeats, N, ...]``, float32.

    Raises:
        InputError: ``further_training`` is needed and was not given.
    """
    why = why_not_fresh(model)
    if why is None:
        protocol = Protocol("adam", lr=0.001, batch_size=_batch_size(len(train)), epochs=MOST_EPOCHS)
    elif further_training is None:
        raise InputError("further_training", f"is needed to predict rows out of sample, since {why}")
    else:
        log.info("rows are predicted by further training without them, since %s", why)
        protocol = further_training
    protocol = replace(protocol, leave_out="mask", dtype="float32", evaluation_dtype="float32")
    setting = Setting.build(model, train, train[:1], protocol, train.targets.device)

    def repeated(repeat: int) -> Tensor:
        runs = _Folds(setting, folds, seed * 1009 + repeat, why is None)
        return runs.stopped_early() if why is None else runs.to_the_end()

    return torch.stack(side_by_side(repeated, range(repeats), worker_threads(setting)))


def why_not_fresh(model: FinalModel) -> str | None:
    """Return why a network can't be trained from new initial parameters, or None."""
    trained = set(model.parameters())
    for name, module in model.network.named_modules():
        own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
        if type(module).__module__.partition(".")[0] == "transformers":
            if any(key.startswith(f"{name}.") or not name for key in trained):
                return "the network was pretrained"
        elif isinstance(module, _NormBase) and module.track_running_stats:
            return "batch normalisation keeps the final model's statistics"
        elif trained.intersection(own) and _reset_of(module) is None:
            return f"{type(module).__name__} has no reset_parameters"
    return None


def _reset_of(module: nn.Module) -> object:
    """Return what gives a module new initial parameters, by the convention of torch.nn; None if nothing."""
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


def fresh(model: FinalModel, seed: int) -> dict[str, Tensor]:
    """Return new initial values of the trainable parameters; see :func:`why_not_fresh`."""
    again, trained = model.to(), set(model.parameters())
    with seeded(seed, next(iter(again.parameters().values())).device), torch.no_grad():
        for name, module in again.network.named_modules():
            own = {f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)}
            reset = _reset_of(module)
            if own & trained and callable(reset):
                reset()
    return {name: p.clone() for name, p in again.parameters().items()}


def _batch_size(instances: int) -> int:
    return min(128, max(16, instances // 64 // 16 * 16))


@dataclass(frozen=True)
class _Folds:
    """One repeat: networks trained without each of the folds, advanced together.

    Args:
        new: start from fresh initial parameters, else from the final model.
    """

    setting: Setting
    folds: int
    seed: int
    new: bool

    def stopped_early(self) -> Tensor:
        """Return the outputs ``[N, ...]`` of held-out rows at the epoch where their mean loss is smallest."""
        setting, best, kept, waited = self.setting, float("inf"), None, 0
        steps = self._steps_per_epoch()
        chunks = self._chunks()
        for epoch in range(1, setting.protocol.epochs + 1):  # type: ignore[operator]  # set by the caller
            outputs = self._advanced(chunks, epoch * steps)
            loss = float(setting.final_model.loss(outputs, setting.train.targets).double().mean())
            if kept is None or loss < best:
                best, kept, waited = loss, outputs, 0
            elif (waited := waited + 1) == PATIENCE:
                break
        assert kept is not None
        return kept

    def to_the_end(self) -> Tensor:
        """Return the outputs ``[N, ...]`` of held-out rows after all of the protocol."""
        setting = self.setting
        steps = setting.protocol.total_steps(len(self._inside()[0]))
        return self._advanced(self._chunks(), steps)

    def _fold(self) -> Tensor:
        """Return the fold ``[N]`` of each row."""
        n = len(self.setting.train)
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        fold = torch.empty(n, dtype=torch.int64)
        fold[drawn] = torch.arange(n) % self.folds
        return fold

    def _inside(self) -> list[Tensor]:
        """Return the rows that each fold's network is trained on."""
        fold = self._fold()
        return [(fold != k).nonzero()[:, 0] for k in range(self.folds)]

    def _steps_per_epoch(self) -> int:
        return -(-min(map(len, self._inside())) // self.setting.protocol.batch_size)

    def _chunks(self) -> list[tuple[list[int], Chunk]]:
        """Return chunks at their start, each with the folds of its replicas."""
        setting, inside = self.setting, self._inside()
        size = min(self.folds, chunk_size(setting, self.folds))
        found = []
        for start in range(0, self.folds, size):
            mine = list(range(start, min(start + size, self.folds)))
            chunk = Chunk(setting, [Replica(self.seed * self.folds + k) for k in mine])
            rows = [mine[min(r, len(mine) - 1)] for r in range(chunk.network.replicas)]
            for r, k in enumerate(rows):
                for name, p in self._start(k).items():
                    chunk.network.parameters[name][r].copy_(p)
            chunk.follow(self._batches(rows, inside, chunk.network.dtype))
            found.append((mine, chunk))
        return found

    def _start(self, fold: int) -> dict[str, Tensor]:
        model = self.setting.final_model
        return fresh(model, self.seed * self.folds + fold) if self.new else model.parameters()

    def _batches(self, rows: Sequence[int], inside: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Batch]:
        """Yield batches of each replica's own rows, without end; folds that differ by a row are cut."""
        count, size = min(map(len, inside)), self.setting.protocol.batch_size
        generators = {k: torch.Generator().manual_seed(self.seed * self.folds + k) for k in set(rows)}
        device = self.setting.device
        while True:
            drawn = {
                k: inside[k][torch.randperm(len(inside[k]), generator=g)[:count]]
                for k, g in generators.items()
            }
            order = torch.stack([drawn[k] for k in rows]).to(device)
            for start in range(0, count, size):
                index = order[:, start : start + size].contiguous()
                weight = torch.full(index.shape, 1 / index.shape[1], dtype=dtype, device=device)
                yield Batch(index, weight)

    def _advanced(self, chunks: Sequence[tuple[list[int], Chunk]], step: int) -> Tensor:
        """Advance to an optimizer step and return the outputs ``[N, ...]`` of each network's own fold."""
        setting, fold, outputs = self.setting, self._fold(), None
        model = setting.final_model.to()
        own = model.parameters()
        for mine, chunk in chunks:
            chunk.advance(step)
            for r, k in enumerate(mine):
                with torch.no_grad():
                    for name, p in own.items():
                        p.copy_(chunk.network.parameters[name][r])
                held_out = (fold == k).nonzero()[:, 0].to(setting.device)
                found = model.outputs(setting.train[held_out])
                if outputs is None:
                    outputs = found.new_empty(len(fold), *found.shape[1:])
                outputs[held_out] = found
        assert outputs is not None
        return outputs
