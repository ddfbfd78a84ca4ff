"""How well scores agree with the sensitivity: cosine, Spearman and Pearson across left-out instances."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import cosine_similarity

from fimo.errors import InputError

MetricName = Literal["cosine", "spearman", "pearson"]
METRICS: tuple[MetricName, ...] = ("cosine", "spearman", "pearson")


def agreement(scores: Tensor, sensitivity: Tensor, metric: MetricName = "cosine") -> Tensor:
    r"""Agreement of a method's scores with the sensitivity, for each evaluation point and test instance.

    .. math::
        a_{ej} = \frac{\langle u_{ej}, v_{ej} \rangle}{\|u_{ej}\| \|v_{ej}\|}

    where u and v are the vectors of scores and of sensitivities over left-out instances: as they are
    (``cosine``), minus their mean (``pearson``), or their ranks, ties sharing the mean rank, minus the mean
    rank (``spearman``). The cosine itself is torchmetrics', which computes in float32.

    Args:
        scores: ``[J, L]``, or ``[E, J, L]`` where the method follows further training.
        sensitivity: ``[E, J, L]``.
        metric: one of ``cosine``, ``spearman``, ``pearson``.

    Returns:
        ``[E, J]`` float32; NaN where a vector is constant (for ``cosine``: zero) or not finite, so that
        nothing undefined passes for a number.

    Raises:
        InputError: shapes that don't match, or an unknown metric.

    Example:
        >>> sensitivity = torch.tensor([[[1.0, 2.0, 4.0], [1.0, 0.0, 0.0]]])
        >>> scores = torch.tensor([[2.0, 4.0, 8.0], [0.0, 0.0, 3.0]])
        >>> agreement(scores, sensitivity, "cosine")
        tensor([[1., 0.]])
        >>> agreement(scores, sensitivity, "spearman")
        tensor([[ 1.0000, -0.5000]])
    """
    check_shapes(scores, sensitivity)
    points, tests, left_out = sensitivity.shape
    u = comparable(scores, metric).expand(points, tests, left_out)
    v = comparable(sensitivity, metric)
    values = cosine_similarity(u.reshape(-1, left_out), v.reshape(-1, left_out), reduction="none")
    return values.clamp(-1, 1).reshape(points, tests)


def comparable(vectors: Tensor, metric: MetricName) -> Tensor:
    """Return what the cosine of is the metric, as float32 unit vectors ``[..., L]``; NaN where undefined.

    Vectors are divided by their largest entry first: scores may be as small as 1e-30, whose squares no
    float32 holds.
    """
    if metric not in METRICS:
        raise InputError("evaluation.metrics", f"expected one of {', '.join(METRICS)} but got {metric!r}")
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    lowest, highest = vectors.amin(-1, keepdim=True), vectors.amax(-1, keepdim=True)  # NaN where an entry is
    largest = torch.maximum(highest, -lowest)
    defined = torch.isfinite(largest) & (largest > 0)
    if metric != "cosine":
        # compared before anything is subtracted: the mean of equal numbers need not equal them
        defined &= highest > lowest
    vectors = ranks(vectors) if metric == "spearman" else vectors / largest
    if metric != "cosine":
        vectors = vectors - vectors.mean(-1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return (vectors / norm.where(defined, torch.nan)).float()


def ranks(vectors: Tensor) -> Tensor:
    """Return the ranks 1…L along the last axis, ties sharing the mean of theirs; of ``vectors``' type."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    order, tied = _sorted(flat)
    position = torch.arange(1, flat.shape[-1] + 1, dtype=flat.dtype, device=flat.device)
    ranked = torch.empty_like(flat).scatter_(-1, order, position.expand_as(flat))
    if len(rows := tied.any(-1).nonzero()[:, 0]):
        ranked[rows] = ranked[rows].scatter(-1, order[rows], _shared(tied[rows], position))
    return ranked.reshape(vectors.shape)


def _sorted(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order ``[n, L]`` of rows, and ``[n, L - 1]`` whether an entry equals the next in it."""
    if flat.dtype != torch.float32 or flat.device.type != "cpu":
        ordered, order = flat.sort(-1)
        return order, ordered[:, 1:] == ordered[:, :-1]
    # one integer holds value and place: numpy sorts integers ten times as fast as torch sorts with indices;
    # a float's bits, the lower 31 flipped where it is negative, are ordered as the floats are
    bits = (flat + 0.0).numpy().view(np.int32)  # -0 becomes 0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys |= np.arange(flat.shape[-1])
    keys.sort(-1)
    values = keys >> 32
    return torch.from_numpy(keys & 0xFFFFFFFF), torch.from_numpy(values[:, 1:] == values[:, :-1])


def _shared(tied: Tensor, position: Tensor) -> Tensor:
    """Return the mean positions ``[n, L]`` of ties in sorted rows, from which entries equal the next."""
    apart = ~tied
    edge = torch.ones_like(apart[:, :1])
    first = torch.where(torch.cat([edge, apart], 1), position, 0).cummax(-1).values
    last = (
        torch.where(torch.cat([apart, edge], 1), position, len(position)).flip(-1).cummin(-1).values.flip(-1)
    )
    return (first + last) / 2


def check_shapes(scores: Tensor, sensitivity: Tensor, name: str = "scores") -> None:
    """Refuse scores that don't belong to a sensitivity."""
    if sensitivity.ndim != 3:
        raise InputError("sensitivity", f"expected [E, J, L] but got {list(sensitivity.shape)}")
    if tuple(scores.shape) not in {tuple(sensitivity.shape), tuple(sensitivity.shape[1:])}:
        expected = f"{list(sensitivity.shape[1:])} or {list(sensitivity.shape)}"
        raise InputError(name, f"expected {expected} but got {list(scores.shape)}")


def mean_and_sem(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over the last axis's defined values; NaN where too few are."""
    defined = torch.isfinite(values)
    count = defined.sum(-1)
    mean = values.nanmean(-1)
    squares = torch.where(defined, (values - mean[..., None]) ** 2, 0.0).sum(-1)
    sem = torch.sqrt(squares / (count - 1).clamp(min=1) / count.clamp(min=1))
    return mean, sem.masked_fill(count < 2, torch.nan)
