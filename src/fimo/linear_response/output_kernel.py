"""Inner products of output Jacobians, and the changes of parameters that their coefficients stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import Rows
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.linear_response.coefficient_optimizer import preconditioner, scaled
from fimo.linear_response.output_space import OutputSpace


@dataclass(frozen=True)
class Kernel:
    """Inner products of output Jacobians at one point of a trajectory.

    Args:
        train: ``[M, R, M·R]``, between the followed training outputs; ``[S, M, R, M·R]`` if of S seeds.
        test: ``[J·D, M·R]``, of test outputs with them; ``[S, J·D, M·R]``.
        jacobians: what they are inner products of; one for each of S seeds, or one for all.
    """

    train: Tensor
    test: Tensor
    jacobians: tuple[Jacobians, ...] = ()

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows ``[S, B·R, M·R]`` of each seed's instances ``[S, B]``."""
        m, r, mr = self.train.shape[-3:]
        if self.train.dim() == 4:
            index = index + (torch.arange(len(index), device=index.device) * m)[:, None]
        return self.train.view(-1, r * mr).index_select(0, index.flatten()).view(len(index), -1, mr)

    def jacobians_of(self, seed: int) -> Jacobians:
        """Return the Jacobians of the s-th seed."""
        return self.jacobians[seed if len(self.jacobians) > 1 else 0]

    @classmethod
    def of_seeds(cls, kernels: Sequence[Kernel]) -> Kernel:
        """Return several seeds' own kernels as one."""
        if len(kernels) == 1:
            return kernels[0]
        jacobians = tuple(j for k in kernels for j in k.jacobians)
        return cls(torch.stack([k.train for k in kernels]), torch.stack([k.test for k in kernels]), jacobians)

    @classmethod
    def at(
        cls,
        gradients: InstanceGradients,
        train: Instances,
        test: Instances,
        space: OutputSpace,
        protocol: Protocol,
        second_moment: dict[str, Tensor] | None,
    ) -> Kernel:
        """Compute it at the parameters of ``gradients``; the second moment is Adam's, by name."""
        followed = Instances(train[space.kept].inputs, space.directions)

        def cotangents(outputs: Tensor, directions: Tensor) -> Tensor:
            return directions.reshape(*directions.shape[:2], *outputs.shape[1:])

        rows = gradients.rows(followed, cotangents, "directions")
        outputs = gradients.outputs(test)
        m, r, _ = space.directions.shape
        weight = preconditioner(protocol.update_rule, second_moment)
        jacobians = Jacobians(rows, outputs, weight)
        if weight is not None and second_moment is not None:
            left, right = (scaled(x, second_moment, protocol.update_rule) for x in (outputs, rows))
            if left is not None and right is not None:
                outputs, rows, weight = left, right, None
        inner = rows.gram(rows, weight).reshape(m, r, m * r)
        return cls(inner, outputs.gram(rows, weight).reshape(-1, m * r), (jacobians,))


@dataclass(frozen=True)
class Jacobians:
    """Output Jacobians at one point of a trajectory.

    Args:
        train: of the followed training outputs, M·R rows.
        test: of test outputs, J·D rows.
        weight: ``[P]``, the optimizer's preconditioner; None: ones.
    """

    train: Rows
    test: Rows
    weight: Tensor | None = None

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return the combinations ``[P, K]`` of training rows with coefficients ``[M·R, K]``."""
        return self.train.transposed_times(coefficients.view(self.train.n, self.train.r, -1))

    def precondition(self, gradients: Tensor) -> Tensor:
        """Return the changes of parameters ``[P, K]`` that gradients ``[P, K]`` stand for."""
        return gradients if self.weight is None else gradients * self.weight[:, None]

    def outputs(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changes of training and test outputs, ``[M·R, K]`` and ``[J·D, K]``."""
        return self.train.times(parameters).flatten(0, 1), self.test.times(parameters).flatten(0, 1)
