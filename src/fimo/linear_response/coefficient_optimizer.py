"""The optimizer's part of the response, on coefficients of Jacobian rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.curvature.jacobian import FactoredRows, LayerFactors, Rows
from fimo.engine.optimizers import Optimizer


class CoefficientOptimizer:
    """Moves coefficients c of a parameter change ``P A^T c`` as the optimizer moves the parameters.

    The last column is a full run's own movement, the others what runs without an instance differ from it.
    Optimizers move them linearly (:meth:`fimo.engine.optimizers.Optimizer.advance_`): what isn't linear in
    the gradient is held fixed, as Adam's second moment, which makes the diagonal P (of the full run).
    Clipping is left out.

    Where the two kinds of runs don't make the same step (``shift`` can make epochs shorter, see
    :mod:`fimo.linear_response.leave_out_weights`), a difference d = x' - x moves, with the optimizer's
    linear maps A' and A of parameters, momentum and gradient (none is the identity, where no step is made),
    by

        A'(x + d, g + dg) - A(x, g) = A'(d, dg) + [A'(x, g) - A(x, g)].

    Args:
        rule: of further training.
        shape: of the coefficients, their rows first.

    Attributes:
        coefficients: of the changes.
        average: of the optimizer's average of gradients, in their units; None without.
    """

    def __init__(self, rule: Optimizer, shape: tuple[int, int], like: Tensor) -> None:
        self.rule = rule
        self.taken = [0, 0]  # steps of runs without an instance, and of full runs: some optimizers count
        self.coefficients = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.average = torch.zeros_like(self.coefficients) if rule.averages else None

    @property
    def resting(self) -> bool:
        """Whether nothing moves without a gradient."""
        return self.average is None and not self.rule.decays

    def step(self, index: Tensor, gradient: Tensor, lr: float | None, lr_without: float | None) -> None:
        """Take a step along a batch's gradient (last column) and along the changes of it.

        Args:
            index: ``[B]``, rows that the gradient has coefficients of; one that occurs twice counts twice.
            gradient: ``[B, L + 1]``.
            lr: of the full runs; None where they make no step.
            lr_without: of the runs without an instance.
        """
        same = lr == lr_without and (not self.rule.counts_steps or self.taken[0] == self.taken[1])
        self.taken[0] += lr_without is not None
        self.taken[1] += lr is not None
        state = _State(self.coefficients, self.average)
        if same:
            self._advance(state, index, gradient, lr, self.taken[1])
            return
        full, without = state.columns(slice(-1, None)), state.columns(slice(None, -1))
        apart = full.copy()
        self._advance(apart, index, gradient[:, -1:], lr_without, self.taken[0])
        self._advance(full, index, gradient[:, -1:], lr, self.taken[1])
        self._advance(without, index, gradient[:, :-1], lr_without, self.taken[0])
        without.add(apart, full)

    def _advance(self, state: _State, index: Tensor, gradient: Tensor, lr: float | None, taken: int) -> None:
        """Take one step, where one is made, which is the run's ``taken``-th."""
        if lr is not None:
            self.rule.advance_(state.coefficients, state.average, index, gradient, lr, taken)


@dataclass(frozen=True)
class _State:
    """Coefficients of a change, and of its momentum (or None), which operations change in place."""

    coefficients: Tensor
    average: Tensor | None

    def columns(self, chosen: slice) -> _State:
        return _State(self.coefficients[:, chosen], None if self.average is None else self.average[:, chosen])

    def copy(self) -> _State:
        return _State(self.coefficients.clone(), None if self.average is None else self.average.clone())

    def add(self, plus: _State, minus: _State) -> None:
        """Add a difference of one column to every column."""
        self.coefficients.add_(plus.coefficients - minus.coefficients)
        if self.average is not None and plus.average is not None and minus.average is not None:
            self.average.add_(plus.average - minus.average)


def preconditioner(rule: Optimizer, second_moment: dict[str, Tensor] | None) -> Tensor | None:
    """Return the optimizer's diagonal ``[P]`` (Adam's is 1 / (sqrt(second moment) + eps)); None without."""
    if not rule.preconditions or second_moment is None:
        return None
    flat = torch.cat([v.flatten() for v in second_moment.values()])
    return 1 / rule.denominator(flat)


def scaled(rows: Rows, second_moment: dict[str, Tensor], rule: Optimizer) -> Rows | None:
    """Return factored rows times the square root of a preconditioner that keeps them factored.

    Each weight's diagonal D [out, in] is replaced by a b^T with the same energy in every row and column,
    sum_i D v = sum_i a b v and sum_o D v = sum_o a b v with v the second moment (by proportional fitting), so
    that inner products cost as little as without it. None for rows that aren't factored.
    """
    if not isinstance(rows, FactoredRows):
        return None
    layers = []
    for layer in rows.layers:
        if layer.weight:
            v = second_moment[layer.weight].double()
            left, right = _proportional_fit(v, v / rule.denominator(v))
            left, right = left.sqrt().to(rows.dtype), right.sqrt().to(rows.dtype)
            layers.append(LayerFactors(layer.weight, None, layer.entering * right, layer.delta * left))
        if layer.bias:
            diagonal = 1 / rule.denominator(second_moment[layer.bias])
            layers.append(LayerFactors(None, layer.bias, layer.entering, layer.delta * diagonal.sqrt()))
    return FactoredRows(tuple(layers), rows.shapes)


def _proportional_fit(base: Tensor, target: Tensor, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """Return a ``[m]`` and b ``[n]`` for which a base b^T has target's row and column sums (nearly)."""
    left, right = torch.ones_like(base[:, 0]), torch.ones_like(base[0])
    tiny = torch.finfo(base.dtype).tiny
    for _ in range(rounds):
        left = target.sum(1) / (base @ right).clamp(min=tiny)
        right = target.sum(0) / (left @ base).clamp(min=tiny)
    return left, right
