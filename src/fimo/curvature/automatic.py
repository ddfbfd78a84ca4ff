"""Rows by automatic differentiation, of any network: all instances at once, or one by one."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fimo.data.instances import Inputs, Instances
from fimo.models.attention import plain_attention
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.rounding import alike, tolerance_of

log = logging.getLogger(__name__)


class AutomaticRows:
    """Jacobians of a final model's outputs, applied to vectors.

    Args:
        final_model: in eval mode.

    Attributes:
        vectorise: until ``torch.func`` fails, or gives something else for the first instance than automatic
            differentiation of it alone, which is told once.
    """

    def __init__(self, final_model: FinalModel) -> None:
        self.final_model, self.buffers, self.vectorise = final_model, final_model.buffers(), True
        self._sizes: set[tuple[int, int]] = set()  # n and R that were tried

    def rows(self, instances: Instances, vectors: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``[n, R, P]``.

        Args:
            vectors: in output space, ``[n, R, ...]``.
            parameters: in whose derivatives, of P entries together.
        """
        if self.vectorise:
            try:
                with plain_attention():
                    found = vmap(functools.partial(self._one, parameters))(instances.inputs, vectors)
                self._compare(found, instances, vectors, parameters)
                return found
            except (RuntimeError, ValueError) as error:
                if "out of memory" in str(error).lower():
                    raise
                reason = str(error).strip().split("\n")[0]
                log.warning("gradients are computed one by one: torch.func can't vectorise them (%s)", reason)
                self.vectorise = False
        with plain_attention():
            return torch.stack(
                [self._single(parameters, instances[i : i + 1], vectors[i]) for i in range(len(instances))]
            )

    def _compare(
        self, found: Tensor, instances: Instances, vectors: Tensor, parameters: dict[str, Tensor]
    ) -> None:
        """Compare with the first instance alone; operations batched wrongly may go by the numbers of both.

        Raises:
            RuntimeError: they differ.
        """
        size = (vectors.shape[0], vectors.shape[1])
        if size in self._sizes:
            return
        with plain_attention():
            alone = self._single(parameters, instances[:1], vectors[0])
        tolerance = tolerance_of(found.dtype, found.device)
        if found.shape != (*size, alone.shape[1]) or not alike([found[0]], [alone], tolerance):
            raise RuntimeError("an operation's gradients differ from those of an instance alone")
        self._sizes.add(size)

    def _one(self, parameters: dict[str, Tensor], inputs: Inputs, vectors: Tensor) -> Tensor:
        """Return the rows ``[R, P]`` of one instance, whose inputs lack the instance axis."""
        alone = {k: v[None] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[None]

        def outputs(at: dict[str, Tensor]) -> Tensor:
            return functional_apply(self.final_model.network, {**self.buffers, **at}, alone)[0]

        pullback = vjp(outputs, parameters)[1]
        found = vmap(lambda v: pullback(v)[0])(vectors)
        return torch.cat([found[name].reshape(len(vectors), -1) for name in parameters], 1)

    def _single(self, parameters: dict[str, Tensor], instance: Instances, vectors: Tensor) -> Tensor:
        parameters = {n: p.clone().requires_grad_() for n, p in parameters.items()}
        with torch.enable_grad():
            network = self.final_model.network
            outputs = functional_apply(network, {**self.buffers, **parameters}, instance.inputs)[0]
        if not outputs.requires_grad:  # these parameters are not used
            return vectors.new_zeros(len(vectors), sum(p.numel() for p in parameters.values()))
        rows = []
        for v in vectors:
            found = torch.autograd.grad(
                outputs,
                list(parameters.values()),
                v,
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
            rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows)
