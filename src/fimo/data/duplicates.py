"""Instances that are exactly the same."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from fimo.data.instances import Instances

HASHED = 4096
"""Instances whose bytes are gathered at a time."""


def duplicate_groups(train: Instances) -> Tensor:
    """Return a number ``[N]`` for each instance that exactly those share whose every tensor is the same.

    By 128 bits of a hash of each instance's bytes, so that no copy of all of them is made and sorted.
    """
    digests = np.empty(len(train), dtype="V16")
    for start in range(0, len(train), HASHED):
        parts = []
        for tensor in train[start : start + HASHED].tensors().values():
            rows = tensor.detach().cpu().reshape(len(tensor), -1)
            rows = rows + 0.0 if rows.is_floating_point() else rows  # -0 and 0 are the same number
            parts.append(rows.contiguous().view(torch.uint8))
        whole = torch.cat(parts, 1).numpy()
        found = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in whole)
        digests[start : start + HASHED] = np.frombuffer(found, dtype="V16")
    _, group = np.unique(digests, return_inverse=True)
    return torch.from_numpy(group.astype(np.int64))
