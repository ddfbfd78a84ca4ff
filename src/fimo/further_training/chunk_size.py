"""How many replicas are advanced together."""

from __future__ import annotations

import torch

from fimo.further_training.chunk import Setting

CPU_BYTES = 4 * 2**20
"""Parameters, gradients and activations of a chunk on a CPU: about a core's share of its caches."""


def chunk_size(setting: Setting, replicas: int) -> int:
    """Return the number of replicas of a chunk: what caches hold, or the device's memory.

    Args:
        replicas: of the job; a chunk is no larger.
    """
    if setting.engine == "loop":
        return max(1, min(8, replicas))
    one = _bytes_per_replica(setting)
    if setting.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(setting.device)
        size = int(0.5 * free / one)
        return max(2, min(replicas, 4096, size))
    workers = worker_threads(setting)
    size = min(64, int(CPU_BYTES / one), -(-replicas // workers))
    return max(2, size)


def worker_threads(setting: Setting) -> int:
    """Return how many chunks are advanced at a time."""
    return torch.get_num_threads() if setting.engine == "linear" and setting.device.type == "cpu" else 1


def _bytes_per_replica(setting: Setting) -> int:
    p = setting.protocol
    width = setting.final_model.parameters()[next(iter(setting.final_model.parameters()))].element_size()
    copies = 2 + 2 * (p.optimizer != "sgd") + (p.momentum > 0)
    parameters = copies * setting.final_model.size
    biggest = sum(t.shape[0] for t in setting.final_model.parameters().values() if t.ndim)
    return width * (parameters + 3 * biggest * p.batch_size)
