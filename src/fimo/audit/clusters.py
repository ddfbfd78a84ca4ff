"""Training rows that act alike: clusters of their effects over test instances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

ALIKE = 0.5
"""Average cosine of effects between the members of two clusters, from which on they become one."""

FEWEST = 3
"""Rows of a cluster."""


def inner_products(effects: Tensor) -> Tensor:
    r"""Return the inner products ``[R, R]`` of rows' effects over test instances, without the noise of seeds.

    With m the mean over S seeds,

    .. math::
        \langle a, b \rangle = \frac{1}{S(S-1)} \sum_{s \ne t} a_s \cdot b_t
                             = \frac{S^2 \, m_a \cdot m_b - \sum_s a_s \cdot b_s}{S(S-1)}

    is without bias, also where runs of a seed share their noise.

    Args:
        effects: ``[S, J, R]`` of single seeds, or ``[J, R]`` without noise.
    """
    effects = effects.double()
    if effects.ndim == 2 or len(effects) == 1:
        mean = effects if effects.ndim == 2 else effects[0]
        return mean.T @ mean
    s, mean = len(effects), effects.mean(0)
    own = torch.einsum("sja,sjb->ab", effects, effects)
    return (s * s * (mean.T @ mean) - own) / (s * (s - 1))


def cosines(effects: Tensor) -> Tensor:
    """Return the cosines ``[R, R]`` between rows' effects over test instances; NaN where one is only noise.

    Args:
        effects: see :func:`inner_products`.
    """
    products = inner_products(effects)
    length = products.diagonal().clamp(min=0).sqrt()
    length = torch.where(length > 0, length, torch.nan)
    return (products / length[:, None] / length).clamp(-1, 1)


def clusters(
    effects: Tensor, rows: Sequence[int], alike: float = ALIKE, fewest: int = FEWEST
) -> list[tuple[int, ...]]:
    """Return groups of rows whose effects over test instances point the same way.

    By agglomerative clustering with average linkage (scikit-learn) of the R rows that are given.

    Args:
        effects: ``[S, J, R]`` measured, or ``[J, R]`` predicted.
        rows: ``[R]``, their positions.
        alike: smallest average cosine.
        fewest: members of a group.
    """
    cosine = cosines(effects)
    known = (~cosine.diagonal().isnan()).nonzero().flatten()
    if len(known) < max(2, fewest):
        return []
    distance = (1 - cosine[known][:, known]).fill_diagonal_(0.0)
    model = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=1 - alike
    )
    labels = torch.from_numpy(model.fit(distance.numpy()).labels_)
    found = []
    for label in range(int(labels.max()) + 1):
        members = known[labels == label].tolist()
        if len(members) >= fewest:
            found.append(tuple(sorted(int(rows[k]) for k in members)))
    return sorted(found, key=lambda group: (-len(group), group))
