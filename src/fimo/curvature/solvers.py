"""Solvers of (C + damping) x = g for many right-hand sides: conjugate gradients, LiSSA; and Lanczos."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.curvature.krylov import BlockLanczos, KrylovSpace
from fimo.curvature.krylov_spaces import Space, SpectralSpace

log = logging.getLogger(__name__)


GROWN = 100.0
"""Growth of a preconditioned residual, which shrinks, that batches don't explain."""


class DivergenceError(ArithmeticError):
    """An iteration grew instead of converging; the message says by how much and what to change."""


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Args:
        vectors: ``[dimension, K]``, in the space's form.
        residuals: ``[K]``, |g - (C + damping) x| / |g| at the end.
        iterations: that were made.
        converged: whether every residual is within the tolerance.
    """

    vectors: Tensor
    residuals: Tensor
    iterations: int
    converged: bool


def conjugate_gradients(
    space: Space,
    damping: float,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    precondition: Callable[[Tensor], Tensor] | None = None,
    start: Tensor | None = None,
) -> Solution:
    """Solve by conjugate gradients (Hestenes and Stiefel, 1952), each right-hand side until it has converged.

    Args:
        tolerance: of |g - (C + damping) x| / |g|.
        max_iterations: after which the iterate is returned as it is, ``converged`` being False.
        precondition: an approximate inverse of C + damping on vectors of the space; symmetric and positive.
        start: the first iterate; zero when None.
    """
    g = space.right_hand_sides()
    x = torch.zeros_like(g) if start is None else start.clone()
    residual = g.clone() if start is None else g - (space.times(x) + damping * x)
    target = tolerance * space.inner(g, g).clamp(min=0).sqrt()
    z = residual if precondition is None else precondition(residual)
    direction, rho = z.clone(), space.inner(residual, z)
    norms = space.inner(residual, residual).clamp(min=0).sqrt()
    iterations = 0
    while iterations < max_iterations and (active := (norms > target) & (rho > 0)).any():
        curved = space.times(direction) + damping * direction
        denominator = space.inner(direction, curved)
        # a converged column gets a zero step, so that it stays what it is instead of turning into NaN; a
        # direction of negative curvature (an indefinite matrix) ends its column likewise
        active &= denominator > 0
        step = torch.where(active, rho / denominator.where(active, 1), 0)
        x += step * direction
        residual -= step * curved
        z = residual if precondition is None else precondition(residual)
        before, rho = rho, torch.where(active, space.inner(residual, z), 0)
        direction = z + torch.where(active, rho / before.where(active, 1), 0) * direction
        norms = torch.where(active, space.inner(residual, residual).clamp(min=0).sqrt(), norms)
        iterations += 1
    size = space.inner(g, g).clamp(min=0).sqrt()
    relative = norms / size.where(size > 0, 1)
    return Solution(x, relative, iterations, bool((norms <= target).all()))


def lissa(
    space: Space,
    damping: float,
    scale: float,
    depth: int,
    tolerance: float = 1e-6,
    batches: Callable[[int], Callable[[Tensor], Tensor]] | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Solve by the truncated Neumann series of LiSSA (Agarwal et al., 2017; Koh and Liang, 2017).

        x_0 = M g / scale,   x_t = x_{t-1} + M (g - (C_t + damping) x_{t-1}) / scale

    With M the identity it is the series x_t = g + (I - (C_t + damping) / scale) x_{t-1}, divided by the
    scale; with M an approximate inverse of C + damping, ASTRA's (Wang et al., 2025).

    Args:
        scale: larger than half the largest eigenvalue of M (C + damping); the speed depends on it, the answer
            does not.
        depth: largest number of iterations.
        tolerance: stops when |g - (C + damping) x_{t-1}| / |g|, the residual, is this small; unused with
            batches.
        batches: maps a step to the product with the matrix of that step's batch; the whole matrix when None.
        precondition: M on vectors of the space, symmetric and positive; the identity when None.

    Raises:
        DivergenceError: the iterate grew beyond what the damped inverse can make of g.
    """
    g = space.right_hand_sides()
    size = space.inner(g, g).clamp(min=0).sqrt()
    size = size.where(size > 0, 1)
    step = (g if precondition is None else precondition(g)) / scale
    x, residuals = step, torch.ones_like(size)
    # of preconditioned steps it is this norm that never grows
    first = space.inner(g, step).clamp(min=0)
    # the inverse is at most 1 / damping for a matrix without negative eigenvalues
    bound = 10 / damping + 10 / scale
    iterations = 0
    for number in range(depth):
        times = space.times if batches is None else batches(number)
        residual = g - (times(x) + damping * x)
        step = (residual if precondition is None else precondition(residual)) / scale
        x = x + step
        iterations = number + 1
        if number % 10 == 9 or iterations == depth:
            if precondition is None:
                growth, most = space.inner(x, x).clamp(min=0).sqrt() / size, bound
            else:
                growth = (space.inner(residual, step).clamp(min=0) / first.where(first > 0, 1)).sqrt()
                most = GROWN
            if not bool((growth <= most).all()):
                raise DivergenceError(
                    f"LiSSA diverged: after {iterations} steps an iterate is {growth.max().item():.3g} times "
                    f"its right-hand side (scale={scale:.3g}, damping={damping:.3g}); raise either of them"
                )
            residuals = space.inner(residual, residual).clamp(min=0).sqrt() / size
            if batches is None and bool((residuals <= tolerance).all()):
                break
    return Solution(x, residuals, iterations, bool((residuals <= tolerance).all()))


def lissa_on_spectrum(space: SpectralSpace, damping: float, scale: float, depth: int) -> Solution:
    """Return :func:`lissa`'s iterate after ``depth`` steps from its sum, without taking the steps.

    Along an eigenvector the series is geometric: x_t / scale = (1 - q^(t+1)) / (c + damping) times g, with
    q = 1 - (c + damping) / scale, and its residual is q^(t+1).

    Raises:
        DivergenceError: |q| > 1 for an eigenvalue.
    """
    values = (
        torch.cat([space.spectrum.eigenvalues, space.spectrum.eigenvalues.new_zeros(1)])[:, None] + damping
    )
    ratio = 1 - values / scale
    if ratio.abs().max() > 1:
        raise DivergenceError(
            f"LiSSA diverged: the largest eigenvalue and damping, {values.max().item():.3g}, exceed twice "
            f"the scale {scale:.3g}; raise the scale"
        )
    left = ratio ** float(depth + 1)  # which may be beyond int64 where features are badly scaled
    g = space.right_hand_sides()
    size = space.inner(g, g).sqrt()
    residuals = space.inner(left * g, left * g).clamp(min=0).sqrt() / size.where(size > 0, 1)
    return Solution((1 - left) / values * g, residuals, depth, True)


def lissa_in_krylov_space(
    space: KrylovSpace, damping: float, scale: float, depth: int, tolerance: float = 1e-6
) -> Solution | None:
    """Return :func:`lissa`'s iterate after ``depth`` steps of the whole matrix, from a Krylov space.

    The iterate x is a polynomial of degree ``depth`` in C applied to g (see :func:`lissa_on_spectrum`), which
    a block Lanczos space of far fewer products gives. It grows until
    (C + damping) x = (1 - q(C)^(depth + 1)) g holds up to ``tolerance`` times |g|; where
    C + damping >= μ, the error of x is then at most tolerance / μ times |g|. It is exact, to rounding, where
    the space has more blocks than ``depth`` or P vectors.

    Returns:
        None where the space's memory does not suffice.

    Raises:
        DivergenceError: |1 - (c + damping) / scale| > 1 for a Ritz value c, so for an eigenvalue.
    """
    krylov = space.krylov
    if not krylov.size:  # nothing to solve for: every right-hand side is zero
        none = krylov.coefficients(lambda c: c)
        return Solution(krylov.combine(none), torch.zeros_like(krylov.norms), 0, True)
    while True:
        values = krylov.values + damping
        ratio = 1 - values / scale
        # rounding makes a zero eigenvalue slightly negative
        if ratio.abs().max() > 1 + 1e-6:
            low = values[0].item()
            raise DivergenceError(
                f"LiSSA diverged: an eigenvalue of {krylov.values[0].item():.3g} is more negative than the "
                f"damping {damping:.3g}; raise the damping"
                if low < 0
                else f"LiSSA diverged: the largest eigenvalue and damping, {values[-1].item():.3g}, exceed "
                f"twice the scale {scale:.3g}; raise the scale"
            )
        coefficients = krylov.coefficients(lambda c: _neumann(c + damping, scale, depth))
        residuals = krylov.residuals(coefficients)
        if bool((residuals <= tolerance).all()) or krylov.exhausted:
            break
        if krylov.size + krylov.width > space.max_vectors:
            return None
        krylov.grow()
    truncated = krylov.coefficients(lambda c: (1 - (c + damping) / scale) ** (depth + 1)).norm(dim=0)
    total = residuals + truncated
    return Solution(krylov.combine(coefficients), total, depth, bool((total <= 2 * tolerance).all()))


def _neumann(values: Tensor, scale: float, depth: int) -> Tensor:
    """Return ``(1 - q^(depth + 1)) / values`` with q = 1 - values / scale, also for values near zero."""
    small = values.abs() < 1e-12 * scale
    safe = values.where(~small, 1)
    # 1 - q^n without cancellation: -expm1(n log1p(-v / scale)) for q > 0
    ratio = 1 - safe / scale
    series = torch.where(
        ratio > 0,
        -torch.expm1((depth + 1) * torch.log1p(-(safe / scale).clamp(max=1 - 1e-15))),
        1 - ratio ** (depth + 1),
    )
    return torch.where(small, (depth + 1) / scale, series / safe)


@dataclass(frozen=True)
class Extremes:
    """Bounds of a symmetric matrix's eigenvalues.

    Args:
        lower: at most the smallest eigenvalue.
        upper: at least the largest eigenvalue.
        error: how far a bound may be off.
        converged: whether that is within the tolerance.
    """

    lower: float
    upper: float
    error: float
    converged: bool


def extreme_eigenvalues(
    times: Callable[[Tensor], Tensor],
    start: Tensor,
    most: int,
    least: int = 30,
    tolerance: float = 0.05,
    negligible: float = 1e-4,
    smallest: bool = True,
) -> Extremes:
    """Return bounds of the extreme eigenvalues: Ritz values of a growing Krylov space, and their residuals.

    Within |C v - θ v| of a Ritz value θ lies an eigenvalue (Parlett, 1980, 4.5); the outermost ones are
    found first. The space grows until both residuals are small; how far the last steps have moved the
    outermost Ritz values counts as well, since a residual may be small before the last eigenvalue appears,
    which a start that hardly contains its eigenvector delays.

    Args:
        times: product with vectors ``[dimension, k]``.
        start: ``[dimension, k]``; several are less likely to contain little of an eigenvector.
        most, least: vectors of the Krylov space.
        tolerance: of a residual, as a share of its Ritz value.
        negligible: of a residual, as a share of the largest Ritz value in size.
        smallest: whether the smallest eigenvalue is wanted too; else ``lower`` may be any bound.
    """
    krylov = BlockLanczos(times, start)
    past: list[Tensor] = []
    while True:
        ends = krylov.values[[0, -1]]
        residuals = krylov.residuals(krylov.vectors[:, [0, -1]])
        past.append(ends)
        moved = (ends - past[-min(6, len(past))]).abs()
        error = torch.zeros_like(ends) if krylov.exhausted else torch.maximum(residuals, moved)
        allowed = torch.maximum(tolerance * ends.abs(), negligible * ends.abs().max())
        close = error <= allowed
        converged = krylov.exhausted or (krylov.size >= least and bool(close.all() if smallest else close[1]))
        if converged or krylov.size >= most:
            break
        krylov.grow()
    lower, upper = (ends + torch.stack([-error[0], error[1]])).tolist()
    return Extremes(lower, upper, error[0 if smallest else 1].item(), converged)


def lanczos(times: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return Ritz values and vectors of a symmetric matrix (Lanczos, 1950; Arnoldi for a symmetric matrix).

    Args:
        times: product with vectors ``[dimension, 1]``.
        start: ``[dimension]``.
        iterations: dimension of the Krylov space; it may end earlier where the space is exhausted.

    Returns:
        values ``[m]`` ascending and orthonormal vectors ``[dimension, m]``; none where ``start`` is zero.
    """
    krylov = BlockLanczos(times, start[:, None])
    while krylov.size < min(iterations, len(start)) and not krylov.exhausted:
        krylov.grow()
    return krylov.values.to(start.dtype), krylov.ritz_vectors()
