"""Optimizer steps as CUDA graphs: recorded once for each shape of a batch, then replayed.

A step of a stacked network is some thirty operations of a few microseconds each. Called one by one from
Python they take longer to launch than to run, unless replicas are many; a recorded step is one launch. What
is recorded are operations on tensors, with the numbers of the call that was recorded: all that differs from
step to step must lie in tensors, which are the batch, the parameters, and the optimizer's state and count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from fimo.engine.leave_out import Batch

log = logging.getLogger(__name__)

Replay = Callable[[], object]
Record = Callable[[Callable[[], None]], Replay]
"""Returns what repeats a function's operations on its tensors, which are left as they are until then."""


def cuda_graph(operations: Callable[[], None]) -> Replay:
    """Record the operations of the current CUDA device, without running them."""
    graph = torch.cuda.CUDAGraph()
    # other threads (Lightning's, say) may use the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        operations()
    return graph.replay


class GraphedSteps:
    """Makes steps, from the second batch of a shape on by replaying what was recorded at the second.

    Steps are the same as without, bit for bit: the same operations on the same numbers.

    Args:
        record: how.

    Attributes:
        refused: a step could not be recorded, so that all are made as they are.
    """

    def __init__(self, record: Record = cuda_graph) -> None:
        self._record = record
        self._recorded: dict[tuple[torch.Size | None, ...], tuple[Batch, Replay] | None] = {}
        self.refused = False

    def take(self, step: Callable[[Batch], None], batch: Batch) -> None:
        """Make a step on a batch.

        Args:
            step: always the same; not kept, so that whoever holds this is freed when it is left alone.
        """
        shapes = tuple(None if t is None else t.shape for t in _tensors(batch))
        if self.refused or shapes not in self._recorded:
            step(batch)  # buffers are allocated and libraries loaded outside of a graph
            self._recorded.setdefault(shapes, None)
            return
        if (recorded := self._recorded[shapes]) is None:
            own = Batch(*(None if t is None else t.clone() for t in _tensors(batch)))  # type: ignore[arg-type]
            try:
                recorded = self._recorded[shapes] = own, self._record(lambda: step(own))
            except RuntimeError as error:
                log.warning("steps are not recorded as CUDA graphs (%s)", str(error).strip().splitlines()[0])
                self.refused = True
                step(batch)
                return
        for own_tensor, tensor in zip(_tensors(recorded[0]), _tensors(batch), strict=True):
            if own_tensor is not None and tensor is not None:
                own_tensor.copy_(tensor)
        recorded[1]()


def _tensors(batch: Batch) -> list[Tensor | None]:
    return [getattr(batch, field.name) for field in fields(batch)]
