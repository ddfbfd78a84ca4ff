"""What the response's recursion carries besides coefficients: vectors of parameters, and shares in them.

Within a segment the change of a run without an instance is, in parameters,

    d_t = P J^T c_t + a_t D + b_t P M + sum_k e_tk v_k,

with J the segment's Jacobian, c_t the coefficients (zero at the segment's start), D and M what earlier
segments left as a change and as a change of the momentum, and vectors v_k that the runs have in common: the
full run's own momentum at the segment's start, and, where parameters decay, its parameters at the points
where they are known. The full run's own movement since the last of these points has the same form, without D
and M. The optimizer moves the few shares a, b, e as it moves coefficients, there being no gradient, so that
only the vectors' outputs are needed, once for each segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fimo.engine.protocol import Protocol
from fimo.linear_response.coefficient_optimizer import CoefficientOptimizer
from fimo.linear_response.output_kernel import Kernel

KnownParameters = Callable[[int], Sequence[Tensor]]
"""Of a point of the runs, each seed's parameters ``[P]`` there."""

CHANGE, MOMENTUM, OWN_MOMENTUM, KNOWN = range(4)
"""Rows of the shares: of D, of M, of the full run's momentum, and of its parameters at known points."""


class Carried:
    """Vectors of parameters of S seeds, their outputs by the present segment's Jacobians, and shares in them.

    Args:
        protocol: of further training.
        seeds: S.
        known: the full runs' parameters; asked for only where parameters decay.
    """

    def __init__(self, protocol: Protocol, seeds: int, known: KnownParameters) -> None:
        self.protocol, self.seeds, self.known = protocol, seeds, known
        self._change: list[Tensor] = []  # of each seed D [P, L]; empty in the first segment
        self._momentum: list[Tensor] = []  # M and the full run's own [P, L + 1], in units of gradients
        self._parameters: list[Tensor] = []  # [P, K], at the segment's known points; none without decay
        self._train: list[Tensor] = []  # of D and M, changes of training outputs [S·M·R, L]
        self._test: list[Tensor] = []  # and of test outputs [S, J·D, L]
        self._common_train: Tensor | None = None  # of the common vectors [S·M·R, 1 + K]
        self._common_test: Tensor | None = None  # [S, J·D, 1 + K]
        self._points: list[int] = []
        self._shares = self._fresh_shares(0, [0, 0])
        self._from: int | None = None  # the row of the parameters from which the full run's movement counts

    def enter(
        self, before: Kernel | None, after: Kernel, points: Sequence[int], optimizer: CoefficientOptimizer
    ) -> None:
        """Enter a segment: turn coefficients into vectors of parameters, and set them to zero.

        Args:
            before, after: the kernels of the segment that ends, and of the one that begins.
            points: where in this segment the full runs' parameters are known, its start first.
        """
        if before is not None:
            self._collect(before, optimizer)
        self._points = list(points) if self.protocol.update_rule.decays else []
        at = [self.known(point) for point in self._points]
        self._parameters = [torch.stack([p[s] for p in at], 1) for s in range(self.seeds)] if at else []
        self._shares = self._fresh_shares(len(at), optimizer.taken)
        self._read(after)

    def know(self, point: int) -> None:
        """Count the full run's movement from its parameters at a point from now on."""
        own = self._shares.coefficients[:, 1]
        own.zero_()
        self._from = None
        if self._parameters:
            self._from = KNOWN + self._points.index(point)
            own[self._from] = 1.0

    def step(self, lr: float | None, lr_without: float | None) -> None:
        """Take an optimizer step."""
        if not self._shares.resting:
            nothing = torch.zeros(0, dtype=torch.int64)
            self._shares.step(nothing, torch.zeros(0, 2, dtype=torch.float64), lr, lr_without)

    def add_train(self, change: Tensor, rows: Tensor) -> None:
        """Add changes of training outputs at ``rows`` (of S·M·R) to ``change`` ``[S, B·R, L + 1]``."""
        without = change[..., :-1]
        for share, part in zip(self._own_shares(), self._train, strict=False):
            if share:
                without.add_(part.index_select(0, rows).view_as(without), alpha=share)
        if self._common_train is not None:
            common = self._common_train.index_select(0, rows) @ self._common_shares(change)
            common = common.view(*change.shape[:2], 2)
            change[..., -1].add_(common[..., 1])
            if self._shares.coefficients[OWN_MOMENTUM:, 0].any():
                without.add_(common[..., :1])

    def add_test(self, change: Tensor) -> Tensor:
        """Add the changes of test outputs to ``change`` ``[S, J·D, L]``."""
        for share, part in zip(self._own_shares(), self._test, strict=False):
            change = change.add(part, alpha=share)
        if self._common_test is not None:
            change = change + self._common_test @ self._common_shares(change)[:, :1]
        return change

    def _own_shares(self) -> list[float]:
        """Return the shares of D and M."""
        found: list[float] = self._shares.coefficients[:OWN_MOMENTUM, 0].tolist()
        return found

    def _common_shares(self, like: Tensor) -> Tensor:
        """Return the common vectors' shares ``[1 + K, 2]`` in a difference and in the full run's movement."""
        shares = self._shares.coefficients.clone()
        if self._from is not None:
            shares[self._from, 1] -= 1.0
        return shares[OWN_MOMENTUM:].to(like)

    def _fresh_shares(self, points: int, taken: Sequence[int]) -> CoefficientOptimizer:
        """Return the shares at the start of a segment."""
        like = torch.zeros(1, dtype=torch.float64)
        found = CoefficientOptimizer(self.protocol.update_rule, (KNOWN + points, 2), like)
        found.taken = list(taken)
        found.coefficients[CHANGE, 0] = 1.0
        if found.average is not None:
            found.average[MOMENTUM, 0] = found.average[OWN_MOMENTUM, 1] = 1.0
        return found

    def _collect(self, kernel: Kernel, optimizer: CoefficientOptimizer) -> None:
        """Make vectors of coefficients, and of the shares in earlier vectors."""
        change, momentum = [], []
        for s in range(self.seeds):
            jacobians = kernel.jacobians_of(s)
            moved = jacobians.precondition(jacobians.combine(self._of_seed(s, optimizer.coefficients)))
            self._add_vectors(moved, s, self._shares.coefficients, jacobians.precondition)
            change.append(moved[:, :-1])
            if optimizer.average is not None and self._shares.average is not None:
                moved = jacobians.combine(self._of_seed(s, optimizer.average))
                self._add_vectors(moved, s, self._shares.average, lambda momentum: momentum)
                momentum.append(moved)
        self._change, self._momentum = change, momentum
        optimizer.coefficients.zero_()
        if optimizer.average is not None:
            optimizer.average.zero_()

    def _of_seed(self, s: int, coefficients: Tensor) -> Tensor:
        return coefficients.view(self.seeds, -1, coefficients.shape[1])[s]

    def _add_vectors(self, into: Tensor, s: int, shares: Tensor, convert: Callable[[Tensor], Tensor]) -> None:
        """Add a seed's vectors times their shares to ``into`` ``[P, L + 1]``, the full run's column last.

        Args:
            convert: makes of momenta what ``into`` is.
        """
        both = shares.to(into)
        if self._change:
            into[:, :-1].add_(self._change[s], alpha=float(both[CHANGE, 0]))
        if self._momentum:
            converted = convert(self._momentum[s])
            into[:, :-1].add_(converted[:, :-1], alpha=float(both[MOMENTUM, 0]))
            _add_common(into, converted[:, -1:] @ both[OWN_MOMENTUM:KNOWN])
        if self._parameters:
            _add_common(into, self._parameters[s] @ both[KNOWN:])

    def _read(self, kernel: Kernel) -> None:
        """Set the vectors' outputs by the Jacobians of a segment."""
        own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(2)]
        shared: list[tuple[Tensor, Tensor]] = []
        for s in range(self.seeds):
            jacobians = kernel.jacobians_of(s)
            parts = [jacobians.precondition(m) for m in self._momentum[s : s + 1]]
            common = [*(p[:, -1:] for p in parts), *self._parameters[s : s + 1]]
            if self._change:
                own[0].append(jacobians.outputs(self._change[s]))
            if parts:
                own[1].append(jacobians.outputs(parts[0][:, :-1]))
            if common:
                shared.append(jacobians.outputs(torch.cat(common, 1)))
        self._train = [torch.cat([train for train, _ in o]) for o in own if o]
        self._test = [torch.stack([test for _, test in o]) for o in own if o]
        self._common_train = self._common_test = None
        if shared:
            self._common_train = torch.cat([train for train, _ in shared])
            self._common_test = torch.stack([test for _, test in shared])
            if not self._momentum:  # a column for the full run's own momentum, which is zero
                self._common_train = torch.nn.functional.pad(self._common_train, (1, 0))
                self._common_test = torch.nn.functional.pad(self._common_test, (1, 0))


def _add_common(into: Tensor, vectors: Tensor) -> None:
    """Add vectors ``[P, 2]`` to all columns but the last, and to the last."""
    into[:, :-1].add_(vectors[:, :1])
    into[:, -1:].add_(vectors[:, 1:])
