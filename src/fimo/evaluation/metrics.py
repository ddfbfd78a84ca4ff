"""How well scores agree with the sensitivity: cosine, Spearman and Pearson across left-out instances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

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
    largest = vectors.abs().amax(-1, keepdim=True)
    defined = torch.isfinite(vectors).all(-1, keepdim=True) & (largest > 0)
    if metric != "cosine":
        # compared before anything is subtracted: the mean of equal numbers need not equal them
        defined &= vectors.amax(-1, keepdim=True) > vectors.amin(-1, keepdim=True)
    vectors = ranks(vectors) if metric == "spearman" else vectors.double() / largest.double()
    if metric != "cosine":
        vectors = vectors - vectors.mean(-1, keepdim=True)
    unit = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return unit.float().masked_fill(~defined, torch.nan)


def cosines(scores: Mapping[str, Tensor], sensitivity: Tensor) -> dict[str, Tensor]:
    """Return the agreement ``[E, J]`` of many methods at once, in one batched product.

    Args:
        scores: by method, what :func:`comparable` returned for ``[J, L]`` or ``[E, J, L]``.
        sensitivity: what it returned for ``[E, J, L]``.
    """
    fixed = [name for name, u in scores.items() if u.ndim == 2]
    values = {name: (u * sensitivity).sum(-1) for name, u in scores.items() if u.ndim == 3}
    if fixed:
        stacked = torch.stack([scores[name] for name in fixed], 1)  # [J, M, L]
        products = torch.bmm(stacked, sensitivity.permute(1, 2, 0))  # [J, M, E]
        values |= {name: products[:, m].T for m, name in enumerate(fixed)}
    return values


def ranks(vectors: Tensor) -> Tensor:
    """Return the ranks 1…L along the last axis, ties sharing the mean of theirs; float64 ``[..., L]``."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    ordered, order = flat.sort(-1)
    position = torch.arange(flat.shape[-1], device=flat.device).expand_as(flat)
    starts = torch.ones_like(flat, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(starts, position, 0).cummax(-1).values
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    last = torch.where(ends, position, flat.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    mean_rank = (first + last).double() / 2 + 1
    return torch.empty_like(mean_rank).scatter_(-1, order, mean_rank).reshape(vectors.shape)


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
