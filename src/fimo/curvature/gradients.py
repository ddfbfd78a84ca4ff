"""Per-instance gradients and Jacobians of a final model, by one backward pass from cotangents.

The derivative of an instance's loss is its outputs' Jacobian applied to the loss's derivative in the outputs;
the Jacobian itself, the Gauss-Newton rows and samples of the Fisher are the same Jacobian applied to other
vectors in output space. So there is one backward pass, and the kinds of rows differ in their cotangents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fimo.curvature.jacobian import DenseRows, FactoredRows, LayerFactors, Rows, StreamedRows
from fimo.data.instances import Inputs, Instances
from fimo.models.attention import plain_attention
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.linear_layers import Layer, backward, forward, layers_on, slopes_of
from fimo.models.losses import Loss
from fimo.store.files import Store, read_tensors, write_tensors
from fimo.store.fingerprint import folder_of, gradients_key

log = logging.getLogger(__name__)

Cotangents = Callable[[Tensor, Tensor], Tensor]
"""(outputs ``[n, ...]``, targets ``[n, ...]``) -> vectors in output space ``[n, R, ...]``."""


class InstanceGradients:
    """Rows of instances for one final model.

    Networks of linear layers are differentiated by products of their layers' inputs and deltas; any other by
    ``torch.func`` in blocks of instances; one that can't be vectorised, instance by instance.

    Args:
        final_model: whose trainable parameters are differentiated, in eval mode.
        memory_mb: of one block of rows, and the most that is kept in memory at once as dense rows.
        storage: dtype in which dense rows are kept or cached (``torch.bfloat16`` halves float32); they are
            computed, and converted back before any product, in the final model's own. None: the same.
        cache: a folder for blocks of rows too large for memory, read back instead of computed again.

    Attributes:
        evaluations: gradients (or products of one instance's Jacobian) computed so far.
    """

    def __init__(
        self,
        final_model: FinalModel,
        memory_mb: float = 1024,
        storage: torch.dtype | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.final_model = final_model
        self.parameters = final_model.parameters()
        self.buffers = final_model.buffers()
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self.p = sum(p.numel() for p in self.parameters.values())
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.memory, self.storage = memory_mb * 2**20, storage or first.dtype
        self.cache = Path(cache) if cache is not None else None
        self.evaluations = 0
        self.vectorise = True
        self._told = False

    def count(self, evaluations: int) -> None:
        """Add to the number of evaluations, for products that don't go through rows."""
        self.evaluations += evaluations

    def losses(self, instances: Instances) -> Rows:
        """Return the gradients of the training loss: R = 1."""
        return self.rows(instances, gradient_of(self.final_model.loss), "loss")

    def measurements(self, instances: Instances) -> Rows:
        """Return the gradients of what is explained on test instances: R = 1."""
        return self.rows(
            instances, gradient_of(self.final_model.measurement or self.final_model.loss), "measurement"
        )

    def outputs(self, instances: Instances) -> Rows:
        """Return the Jacobians of the outputs: R = D, the number of (flattened) outputs."""
        return self.rows(instances, _identity, "outputs")

    def gauss_newton(self, instances: Instances) -> Rows:
        """Return the rows A with ``A^T A = sum_i J_i^T H_i J_i``, H_i the loss's Hessian in the outputs.

        R is D, or less where every H_i lacks rank (D - 1 for cross-entropy).
        """
        return self.rows(instances, self.final_model.loss.hessian_root, "gauss_newton")

    def sampled(self, instances: Instances, samples: int = 1, seed: int = 0) -> Rows:
        """Return rows A with ``E[A^T A] = sum_i J_i^T H_i J_i``: gradients for targets that the model draws.

        R is the number of samples; each is divided by its square root.
        """
        loss, generator = self.final_model.loss, torch.Generator(self.device)

        def cotangents(f: Tensor, y: Tensor) -> Tensor:
            return loss.sampled_gradients(f, y, samples, generator)

        return self.rows(
            instances, cotangents, f"sampled-{samples}-{seed}", lambda: generator.manual_seed(seed)
        )

    def rows(
        self,
        instances: Instances,
        cotangents: Cotangents,
        name: str,
        before: Callable[[], object] = lambda: None,
    ) -> Rows:
        """Return the Jacobians of instances applied to cotangents.

        Args:
            name: of the kind of rows, part of a cached block's key.
            before: called before each pass over the instances (to seed a generator).
        """
        if (layers := layers_on(self.final_model, instances)) is not None:
            before()
            return self._factored(instances, layers, cotangents)
        probe = self.final_model.outputs(instances[:1])
        before()
        r = cotangents(probe, instances.targets[:1]).shape[1]
        block = max(1, int(self.memory / (self.p * r * torch.empty((), dtype=self.dtype).element_size())))
        stream = self._stream(instances, cotangents, name, before, block, r)
        if len(instances) <= block:
            return DenseRows(stream.dense(), self.shapes)
        if len(instances) * self.p * r * torch.empty((), dtype=self.storage).element_size() <= self.memory:
            kept = [b.to(self.storage) for b in stream.blocks()]
            return StreamedRows(lambda: iter(kept), len(instances), r, self.shapes, self.dtype, self.device)
        if self.cache is None and not self._told:
            self._told = True
            log.info(
                "gradients of %d instances take %.1f GiB, more than memory_mb=%.0f: they are computed again "
                "whenever they are used, all of them for each block of %d where two sets are multiplied; "
                "methods.NAME.memory_mb=%d for the method NAME, its storage=bfloat16 or its cache=FOLDER "
                "saves that",
                len(instances),
                len(instances) * self.p * r * torch.empty((), dtype=self.dtype).element_size() / 2**30,
                self.memory / 2**20,
                block,
                math.ceil(len(instances) * self.p * r * self.dtype.itemsize / 2**20),
            )
        return stream

    def _factored(self, instances: Instances, layers: list[Layer], cotangents: Cotangents) -> FactoredRows:
        state = {name: p.detach() for name, p in self.final_model.network.named_parameters()}
        assert isinstance(instances.inputs, Tensor)
        passed = forward(layers, state, instances.inputs.to(self.dtype).flatten(1))
        vectors = cotangents(passed.outputs, instances.targets)
        self.evaluations += vectors.shape[0] * vectors.shape[1]
        slopes = [None if slope is None else slope[:, None] for slope in slopes_of(layers, passed)]
        found: list[LayerFactors] = []
        for k, _, delta in backward(layers, state, slopes, vectors):
            names = [name if name in self.parameters else None for name in (layers[k].weight, layers[k].bias)]
            if any(names):
                found.append(LayerFactors(names[0], names[1], passed.entering[k], delta.contiguous()))
        return FactoredRows(tuple(reversed(found)), self.shapes)

    def _stream(
        self,
        instances: Instances,
        cotangents: Cotangents,
        name: str,
        before: Callable[[], object],
        block: int,
        r: int,
    ) -> StreamedRows:
        def blocks() -> Iterator[Rows]:
            before()
            folder = self._cached_at(instances, name, block)
            for start, part in zip(range(0, len(instances), block), instances.batches(block), strict=True):
                path = None if folder is None else folder / f"{start}.safetensors"
                if path is not None and path.exists():
                    values = read_tensors(path, self.device)["rows"].to(self.dtype)
                else:
                    values = self._dense(part, cotangents)
                    if path is not None:
                        write_tensors(path, {"rows": values.to(self.storage)})
                        values = values.to(self.storage).to(self.dtype)
                yield DenseRows(values, self.shapes)

        return StreamedRows(blocks, len(instances), r, self.shapes, self.dtype, self.device)

    def _cached_at(self, instances: Instances, name: str, block: int) -> Path | None:
        """Return the folder of a set's cached blocks; None where none is wanted, or can be described."""
        if self.cache is None or len(instances) <= block:
            return None
        settings = {"block": block, "storage": str(self.storage), "dtype": str(self.dtype)}
        store = Store(self.cache)
        return folder_of(
            store, "gradients", lambda: gradients_key(self.final_model, instances, name, settings)
        )

    def _dense(self, instances: Instances, cotangents: Cotangents) -> Tensor:
        """Return ``[n, R, P]`` of one block."""
        vectors = cotangents(self.final_model.outputs(instances), instances.targets)
        self.evaluations += vectors.shape[0] * vectors.shape[1]
        if self.vectorise:
            try:
                with plain_attention():
                    return vmap(self._one)(instances.inputs, vectors)
            except (RuntimeError, ValueError) as error:
                if "out of memory" in str(error).lower():
                    raise
                reason = str(error).strip().split("\n")[0]
                log.warning("gradients are computed one by one: torch.func can't vectorise them (%s)", reason)
                self.vectorise = False
        with plain_attention():
            return torch.stack(
                [self._single(instances[i : i + 1], vectors[i]) for i in range(len(instances))]
            )

    def _one(self, inputs: Inputs, vectors: Tensor) -> Tensor:
        """Return the rows ``[R, P]`` of one instance, whose inputs lack the instance axis."""
        alone = {k: v[None] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[None]

        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return functional_apply(self.final_model.network, {**self.buffers, **parameters}, alone)[0]

        pullback = vjp(outputs, self.parameters)[1]
        found = vmap(lambda v: pullback(v)[0])(vectors)
        return torch.cat([found[name].reshape(len(vectors), -1) for name in self.shapes], 1)

    def _single(self, instance: Instances, vectors: Tensor) -> Tensor:
        parameters = {n: p.clone().requires_grad_() for n, p in self.parameters.items()}
        with torch.enable_grad():
            network = self.final_model.network
            outputs = functional_apply(network, {**self.buffers, **parameters}, instance.inputs)[0]
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


def gradient_of(loss: Loss) -> Cotangents:
    """Return the cotangents of a loss's gradients: R = 1."""
    return lambda outputs, targets: loss.gradient(outputs, targets)[:, None]


def _identity(outputs: Tensor, targets: Tensor) -> Tensor:
    n, shape = outputs.shape[0], outputs.shape[1:]
    identity = torch.eye(shape.numel(), dtype=outputs.dtype, device=outputs.device)
    return identity.view(1, shape.numel(), *shape).expand(n, -1, *shape)
