"""The response's diagonal: what leaving instances out does to their own losses, linear in their number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import split
from fimo.curvature.kronecker import KroneckerFactors, fit_factors, no_factors
from fimo.curvature.spectrum import Phi
from fimo.data.instances import Inputs, Instances
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.forward_mode import jvp

PIECE_BYTES = 2**26
"""Of parameter vectors that a piece of rows is given; what is made of them takes about twice as much."""


def own_response(
    final_model: FinalModel, train: Instances, phi: Phi, copies: Tensor, gradients: InstanceGradients
) -> Tensor:
    """Return the change ``[N]`` of each instance's own loss when it is left out.

    In EK-FAC's eigenbasis (Q, Λ) of the final model, with N the number of training instances,

        loss_i(f_i + J_i Q phi(Λ) Q^T g_i / N) - loss_i(f_i),

    the diagonal of :func:`~fimo.linear_response.kronecker_response.kronecker_response`. Where there are no
    factors, the curvature is taken as zero: a single gradient step.

    Args:
        phi: of the curvature.
        copies: ``[N]``, how many copies of each instance are left out together.
    """
    factors = None if no_factors(final_model, train, "auto") else fit_factors(gradients, train)
    losses = final_model.measurement or final_model.loss
    parameters, buffers = final_model.parameters(), final_model.buffers()

    def along(inputs: Inputs, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return one instance's outputs, and their derivative along a direction of its own."""
        one = {k: v[None] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[None]
        outputs, moved = jvp(
            lambda p: functional_apply(final_model.network, {**buffers, **p}, one),
            (parameters,),
            ({name: direction[name] for name in parameters},),  # layers come in another order
        )
        return outputs[0], moved[0]

    found, size = [], max(1, PIECE_BYTES // (16 * final_model.size))
    for start in range(0, len(train), size):
        some = train[start : start + size]
        force = gradients.losses(some).dense()[:, 0]
        force = force * (copies[start : start + size, None].to(force) / len(train))
        direction = {
            name: part.view(len(some), *parameters[name].shape)
            for name, part in _answer(factors, phi, split(force, gradients.shapes)).items()
        }
        with torch.no_grad():
            outputs, moved = vmap(along, randomness="same")(some.inputs, direction)
            found.append((losses(outputs + moved, some.targets) - losses(outputs, some.targets)).double())
    return torch.cat(found)


def _answer(factors: KroneckerFactors | None, phi: Phi, force: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Q phi(Λ) Q^T of forces ``[n, p]`` by parameter."""
    if factors is None:
        return {name: part * phi(torch.zeros(())).to(part) for name, part in force.items()}
    moved: dict[str, Tensor] = {}
    for block in factors.blocks:
        rotated = block.rotate(block.gather(force))
        scaled = rotated * phi(block.values.double().clamp(min=0)).to(rotated.dtype)
        block.scatter(block.rotate_back(scaled), moved, factors.shapes)
    return moved
