"""How well scores agree with the sensitivity across left-out instances, by several metrics.

A metric is a class here: what it makes of a vector, once, and its value for two such vectors. Agreements
with subsets and resamples of seeds, intervals and noise ceilings ask it nothing else; a metric whose expected
value under normal noise is known in closed form may say so, for its ceilings.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import cosine_similarity

from fimo.errors import InputError

MetricName = Literal["cosine", "spearman", "pearson", "kendall"]

PAIRS = 2**22
"""Most pairs of entries that Kendall's tau holds at once."""


class Metric:
    """A function of two vectors in [-1, 1], which is 1 for equal ones.

    A vector for which it is undefined (constant, or not finite) becomes NaN, and so does the value: nothing
    undefined passes for a number.
    """

    name: ClassVar[str]

    centred: ClassVar[bool] = True
    """Whether adding a number to a vector changes nothing."""

    by_cosine: ClassVar[bool] = False
    """Whether it is the cosine of vectors that noise is added to, so that its ceilings need no law."""

    def prepared(self, vectors: Tensor) -> Tensor:
        """Return vectors ``[..., L]`` as float32 ones of which values are taken, NaN where undefined."""
        raise NotImplementedError

    def paired(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the values ``[...]`` of pairs of prepared vectors ``[..., L]``."""
        raise NotImplementedError

    def crossed(self, scores: Tensor, means: Tensor) -> Tensor:
        """Return the values ``[M, K, J]`` of prepared vectors ``[J, M, L]`` with ``[K, J, L]``."""
        return torch.stack([self.paired(scores[:, m], means) for m in range(scores.shape[1])])

    # -- the law under normal noise, for ceilings

    def expected(self, correlation: Tensor, count: int) -> Tensor:
        """Return the expected value for ``count`` normal pairs of this correlation; by simulation."""
        known, grid = _simulated(type(self), count)  # type: ignore[arg-type]  # mypy: type's __hash__
        return _interpolated(correlation.clamp(-1, 1).double(), grid, known)

    def correlation_of(self, value: Tensor, count: int) -> Tensor:
        """Return the correlation at which :meth:`expected` is ``value``, by interpolation."""
        grid = torch.sin(torch.linspace(-math.pi / 2, math.pi / 2, 4001, dtype=torch.float64))
        return _interpolated(value.double(), self.expected(grid, count), grid).clamp(-1, 1)

    def efficiency(self, count: int) -> float:
        """Return for how many values one counts in telling a correlation from zero; by simulation."""
        slope = float(self.expected(torch.tensor([0.05]), count)) / 0.05
        generator = torch.Generator().manual_seed(0)
        u, v = torch.randn(2, 4000, count, generator=generator, dtype=torch.float32).unbind()
        spread = float(self.paired(self.prepared(u), self.prepared(v)).double().var())
        return min(1.0, slope**2 / (spread * (count - 1)))


class Cosine(Metric):
    """The cosine of the vectors as they are; torchmetrics', which computes in float32."""

    name = "cosine"
    centred = False
    by_cosine = True

    def prepared(self, vectors: Tensor) -> Tensor:
        vectors, largest, defined = _defined(vectors, self.centred)
        vectors = self.transformed(vectors, largest)
        if self.centred:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        return (vectors / norm.where(defined, torch.nan)).float()

    def transformed(self, vectors: Tensor, largest: Tensor) -> Tensor:
        """Return vectors of whose cosines values are made, about 1 in size."""
        return vectors / largest

    def paired(self, u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(-1)

    def crossed(self, scores: Tensor, means: Tensor) -> Tensor:
        return torch.einsum("jml,kjl->mkj", scores, means)


class Pearson(Cosine):
    """The cosine of the vectors minus their mean."""

    name = "pearson"
    centred = True


class Spearman(Pearson):
    """The cosine of the vectors' ranks minus the mean rank, ties sharing the mean rank."""

    name = "spearman"
    by_cosine = False

    def transformed(self, vectors: Tensor, largest: Tensor) -> Tensor:
        return ranks(vectors)

    def expected(self, correlation: Tensor, count: int) -> Tensor:
        """Return the expected rank correlation of normal pairs (Moran, 1948)."""
        both = torch.asin(correlation) + (count - 2) * torch.asin(correlation / 2)
        return 6 / (math.pi * (count + 1)) * both

    def efficiency(self, count: int) -> float:
        """Return Hotelling and Pabst's (1936), 9 / pi^2 for many."""
        return float((3 * count / (math.pi * (count + 1))) ** 2)


class Kendall(Metric):
    """Kendall's tau-b: pairs of entries in the same order minus those in the opposite, over untied pairs.

    tau = sum_ik sign(u_i - u_k) sign(v_i - v_k) / sqrt(pairs untied in u times pairs untied in v). Time grows
    with L^2 for each pair of vectors.
    """

    name = "kendall"

    def prepared(self, vectors: Tensor) -> Tensor:
        vectors, _, defined = _defined(vectors, centred=True)
        return ranks(vectors).where(defined, torch.nan).float()

    def paired(self, u: Tensor, v: Tensor) -> Tensor:
        u, v = torch.broadcast_tensors(u, v)
        rows = u.reshape(-1, 1, u.shape[-1]), v.reshape(-1, u.shape[-1])[None]
        return self.crossed(*rows).reshape(u.shape[:-1])

    def crossed(self, scores: Tensor, means: Tensor) -> Tensor:
        count = scores.shape[-1]
        rows = max(1, PAIRS // max(1, count * max(scores[..., 0].numel(), means[..., 0].numel())))
        shape = scores.shape[1], *means.shape[:2]
        same, of_scores = torch.zeros(shape), torch.zeros(scores.shape[:2])
        of_means = torch.zeros(means.shape[:2])
        for start in range(0, count, rows):  # pairs (i, k), i among some entries and k among all
            u, v = (
                (x[..., start : start + rows, None] - x[..., None, :]).sign().flatten(-2)
                for x in (scores, means)
            )
            same += torch.einsum("jml,kjl->mkj", u, v)
            of_scores += u.abs().sum(-1)
            of_means += v.abs().sum(-1)
        return same / (of_scores.T[:, None].sqrt() * of_means.sqrt())

    def expected(self, correlation: Tensor, count: int) -> Tensor:
        """Return Greiner's relation (1909)."""
        return 2 / math.pi * torch.asin(correlation)

    def efficiency(self, count: int) -> float:
        """Return slope^2 over (count - 1) times the variance of unrelated vectors' tau, 9 / pi^2 for many."""
        return 18 * count / (math.pi**2 * (2 * count + 5))


KINDS: dict[str, type[Metric]] = {kind.name: kind for kind in (Cosine, Spearman, Pearson, Kendall)}
METRICS: tuple[str, ...] = tuple(KINDS)
DEFAULT: tuple[MetricName, ...] = ("cosine", "spearman", "pearson")
"""What methods are judged by where nothing is said."""


def metric_of(name: str) -> Metric:
    """Return a metric by its name.

    Raises:
        InputError: there is none of this name.
    """
    if name not in KINDS:
        raise InputError("evaluation.metrics", f"expected one of {', '.join(METRICS)} but got {name!r}")
    return KINDS[name]()


def agreement(scores: Tensor, sensitivity: Tensor, metric: MetricName = "cosine") -> Tensor:
    r"""Agreement of a method's scores with the sensitivity, for each evaluation point and test instance.

    .. math::
        a_{ej} = \frac{\langle u_{ej}, v_{ej} \rangle}{\|u_{ej}\| \|v_{ej}\|}

    where u and v are the vectors of scores and of sensitivities over left-out instances: as they are
    (``cosine``), minus their mean (``pearson``), their ranks, ties sharing the mean rank, minus the mean
    rank (``spearman``), or the signs of the differences of their entries (``kendall``, tau-b).

    Args:
        scores: ``[J, L]``, or ``[E, J, L]`` where the method follows further training.
        sensitivity: ``[E, J, L]``.
        metric: one of ``cosine``, ``spearman``, ``pearson``, ``kendall``.

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
    kind = metric_of(metric)
    points, tests, left_out = sensitivity.shape
    u = kind.prepared(scores).expand(points, tests, left_out).reshape(-1, left_out)
    v = kind.prepared(sensitivity).reshape(-1, left_out)
    values = cosine_similarity(u, v, reduction="none") if isinstance(kind, Cosine) else kind.paired(u, v)
    return values.clamp(-1, 1).reshape(points, tests)


def _defined(vectors: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors as floating point, their largest entries, and where metrics of them are defined.

    Vectors are divided by their largest entry first: scores may be as small as 1e-30, whose squares no
    float32 holds.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    lowest, highest = vectors.amin(-1, keepdim=True), vectors.amax(-1, keepdim=True)  # NaN where an entry is
    largest = torch.maximum(highest, -lowest)
    defined = torch.isfinite(largest) & (largest > 0)
    if centred:
        # compared before anything is subtracted: the mean of equal numbers need not equal them
        defined &= highest > lowest
    return vectors, largest, defined


DRAWS = 4000
"""Pairs of vectors of which a metric's law is the mean, where it isn't known in closed form."""


@functools.cache
def _simulated(kind: type[Metric], count: int) -> tuple[Tensor, Tensor]:
    """Return a metric's expected values for normal pairs, and the correlations ``[33]`` that they are of."""
    metric = kind()
    grid = torch.sin(torch.linspace(-math.pi / 2, math.pi / 2, 33, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    u, noise = torch.randn(2, DRAWS, count, generator=generator, dtype=torch.float32).unbind()
    prepared = metric.prepared(u)
    means = [
        metric.paired(prepared, metric.prepared(float(r) * u + math.sqrt(1 - float(r) ** 2) * noise))
        for r in grid
    ]
    return torch.stack([m.double().nanmean() for m in means]), grid


def _interpolated(at: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Return the piecewise linear function that is ``values`` at ``known``, ascending."""
    above = torch.searchsorted(known, at.contiguous()).clamp(1, len(known) - 1)
    share = (at - known[above - 1]) / (known[above] - known[above - 1])
    return values[above - 1] + share * (values[above] - values[above - 1])


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
