"""How a network is run in the steps of further training: in train mode, but without state of its own.

A forward pass in train mode may draw random numbers, which are seeded step by step, and change buffers
(running means, spectral normalisation's power iteration). Replicas take turns in one copy of the network, so
such changes would carry from one to the next; modules that make them stay in eval mode.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fimo.data.instances import Inputs, Instances
from fimo.errors import InputError, shortened
from fimo.models.attention import plain_attention
from fimo.models.copied import duplicate
from fimo.models.dropout import DrawnFrom
from fimo.models.final_model import FinalModel, apply

log = logging.getLogger(__name__)

TORCH = "torch"

_GENERATOR = threading.RLock()
"""Held by whoever seeds the process's one generator, so that threads do not draw from each other's stream."""


@dataclass(frozen=True)
class TrainMode:
    """What a network's modules do in a training step.

    Args:
        kept_in_eval: names of modules that stay in eval mode since they would change buffers, besides batch
            normalisation.
        stochastic: whether a forward pass draws random numbers (dropout of any kind).
        only_masks: whether these are masks of plain dropout alone, which a generator of the step's own gives;
            others are the process's, for which threads take turns.
    """

    kept_in_eval: tuple[str, ...] = ()
    stochastic: bool = False
    only_masks: bool = False

    @classmethod
    def of(cls, final_model: FinalModel, train: Instances) -> TrainMode:
        """Find out by trying, on two instances.

        Raises:
            InputError: buffers change whatever the mode, so that outputs depend on what was evaluated before;
                or random numbers are drawn that are not torch's.
        """
        two = train[:2].inputs
        kept = _kept_in_eval(final_model, two)
        network = cls(kept).set(duplicate(final_model.network))
        drawn = drawn_from(network, two)
        if others := drawn - {TORCH}:
            raise InputError(
                "model.network",
                f"in train mode it draws random numbers from {' and '.join(sorted(others))}, which no seed "
                "of further training sets, so that runs could not be compared; expected torch's (torch.rand, "
                "dropout)",
            )
        stochastic = TORCH in drawn
        return cls(kept, stochastic, stochastic and _draws_only_masks(network, two))

    def drawing(
        self, seed: int, device: torch.device, after: Tensor | None = None
    ) -> AbstractContextManager[object]:
        """Run a block with the random state of ``seed``, the same numbers however they are drawn.

        Args:
            after: a state of the generator to go on from, where only masks are drawn.
        """
        if self.only_masks:
            generator = torch.Generator().manual_seed(seed)
            return DrawnFrom(generator if after is None else generator.set_state(after))
        return _masks_as_alone(seed, device) if self.stochastic else contextlib.nullcontext()

    def set(self, network: nn.Module) -> nn.Module:
        """Put a network in train mode, but for the modules that stay in eval mode; return it."""
        network.train()
        for name, module in network.named_modules(remove_duplicate=False):
            if name in self.kept_in_eval or isinstance(module, nn.modules.batchnorm._NormBase):
                module.training = False  # this module alone: what it contains keeps its mode
        return network


def draws(network: nn.Module, inputs: Inputs) -> bool:
    """Return whether a forward pass, in the network's present mode, draws torch's random numbers."""
    return TORCH in drawn_from(network, inputs)


def drawn_from(network: nn.Module, inputs: Inputs) -> set[str]:
    """Return whose random numbers a forward pass, in the network's present mode, draws.

    All generators are put back.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    kept = random.getstate(), np.random.get_state(legacy=False)
    try:
        with seeded(0, device), torch.no_grad():
            before = _states(device)
            apply(network, inputs)
            return {name for name, state in _states(device).items() if state != before[name]}
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def _states(device: torch.device) -> dict[str, object]:
    """Return the states of generators by whose they are."""
    of_torch = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    of_numpy = np.random.get_state(legacy=False)["state"]
    return {
        TORCH: of_torch.numpy().tobytes(),
        "Python's random": random.getstate(),
        "NumPy's random": (of_numpy["key"].tobytes(), of_numpy["pos"]),
    }


def _draws_only_masks(network: nn.Module, inputs: Inputs) -> bool:
    """Return whether a step draws dropout's masks alone, and in the forward pass, by trying.

    Not where a backward pass draws as well, or repeats the forward pass: the masks would be others.
    """
    free = [p.requires_grad_() for p in network.parameters() if p.is_floating_point()]
    device = next((p.device for p in free), torch.device("cpu"))
    if device.type != "cpu":
        return False

    def gradient() -> Sequence[Tensor]:
        value = apply(network, inputs).square().sum()
        return torch.autograd.grad(value, free, allow_unused=True, materialize_grads=True)

    with torch.enable_grad(), plain_attention():
        for seed in (1, 2, 3):
            with seeded(seed, device):
                expected = gradient()
            with seeded(0, device):  # another state, from which a second forward pass would draw
                before = torch.get_rng_state()
                with DrawnFrom(torch.Generator().manual_seed(seed)):
                    found = gradient()
                if not torch.equal(before, torch.get_rng_state()):
                    return False
            if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                return False
    return True


@contextlib.contextmanager
def _masks_as_alone(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block with the random state of ``seed``, and dropout's masks under ``torch.func`` as without."""
    with seeded(seed, device), DrawnFrom(None) if device.type == "cpu" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block with the random state of ``seed`` and put the caller's back.

    One thread at a time: a process has one generator for each device.
    """
    devices = [device] if device.type == "cuda" else []
    with _GENERATOR, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _kept_in_eval(final_model: FinalModel, inputs: Inputs) -> tuple[str, ...]:
    """Return the modules whose buffers a forward pass in train mode changes, or that hold such modules."""
    network = duplicate(final_model.network)
    if not any(True for _ in network.buffers()):
        return ()
    _move(network)
    with torch.no_grad():
        apply(network, inputs)  # fills what is computed once and kept
    if changed := _changed_buffers(network, inputs):
        raise InputError(
            "model.network",
            f"a forward pass in eval mode changes {shortened(changed)}, so that outputs would depend on what "
            "was evaluated before; expected buffers that eval mode leaves alone",
        )
    kept: tuple[str, ...] = ()
    everything = tuple(name for name, _ in network.named_modules(remove_duplicate=False))
    while kept != everything and (changed := _changed_buffers(TrainMode(kept).set(network), inputs)):
        outwards = [m for name in changed for m in _outwards(name.rpartition(".")[0]) if m not in kept]
        # a buffer may be changed by a module that holds its owner: then the next one outwards, to the whole
        # network; and, rarely, by one that does not
        kept = (*kept, outwards[0]) if outwards else everything
    if kept:
        log.info(
            "%s: further training keeps them in eval mode, since their buffers change in train mode",
            shortened([name or "the network itself" for name in kept]),
        )
    return kept


def _outwards(name: str) -> Iterator[str]:
    """Yield a module's name and those of the modules that hold it, up to the whole network's (empty)."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _move(network: nn.Module) -> None:
    """Move parameters a little, so that what has settled for them (a power iteration) moves as well."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.is_floating_point():
                noise = torch.randn(
                    p.shape[-1:], generator=generator
                )  # column by column: large ones are many
                p.mul_(1 + 0.01 * noise.to(p))


def _changed_buffers(network: nn.Module, inputs: Inputs) -> list[str]:
    """Return the names of buffers that a forward pass changes."""
    before = {name: b.clone() for name, b in network.named_buffers()}
    with seeded(0, next((p.device for p in network.parameters()), torch.device("cpu"))), torch.no_grad():
        apply(network, inputs)
    return [n for n, b in network.named_buffers() if n not in before or not _same(b, before[n])]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
