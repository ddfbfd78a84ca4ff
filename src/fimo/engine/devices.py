"""Where runs are made, and how a device is kept busy."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def trainer_device(trainer: Mapping[str, Any] | None) -> torch.device:
    """Return the device on which a Trainer of these arguments would run."""
    if trainer is None or trainer.get("accelerator", "cpu") == "cpu":
        return torch.device("cpu")
    from fimo.engine.driver import make_trainer  # Lightning takes seconds to import

    return make_trainer(trainer).strategy.root_device


def without_waiting(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a CPU's tensor on a device, without waiting for what the device has to do before."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Launched:
    """What a device has done of what was launched on it: two blocks are under way at most.

    So it never waits for the next one, nor runs so far ahead that time says nothing. A CPU is never behind.
    """

    def __init__(self, device: torch.device, step: int) -> None:
        self._device, self.done = device, step
        self._under_way: deque[tuple[int, torch.cuda.Event]] = deque()

    def block(self, step: int) -> None:
        """Note that all before ``step`` was launched; wait for all but the last block."""
        if self._device.type != "cuda":
            self.done = step
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append((step, event))
        self._wait(1)

    def finish(self) -> None:
        """Wait for all."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        while len(self._under_way) > left:
            self.done, event = self._under_way.popleft()
            event.synchronize()


@contextlib.contextmanager
def products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Take float32 products and convolutions of a GPU in full precision, or in TF32 (10 bits of mantissa).

    By torch's defaults, products are in full precision and convolutions are not.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
