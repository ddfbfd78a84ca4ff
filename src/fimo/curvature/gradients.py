"""Per-instance gradients and Jacobians of a final model, by one backward pass from cotangents.

The derivative of an instance's loss is its outputs' Jacobian applied to the loss's derivative in the outputs;
the Jacobian itself, the Gauss-Newton rows and samples of the Fisher are the same Jacobian applied to other
vectors in output space. So there is one backward pass, and the kinds of rows differ in their cotangents.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fimo.curvature.arranged_rows import ArrangedRows
from fimo.curvature.jacobian import DenseRows, FactoredRows, LayerFactors, Rows, StreamedRows, split
from fimo.curvature.module_rows import FormedCall, ModuleRows
from fimo.curvature.recording import Recorder, UnseenError, recorder_for
from fimo.data.instances import Inputs, Instances
from fimo.models.attention import plain_attention
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.linear_layers import Layer, backward, forward, layers_on, slopes_of
from fimo.models.losses import Loss
from fimo.store.files import Store, read_tensors, write_tensors
from fimo.store.fingerprint import folder_of, gradients_key

log = logging.getLogger(__name__)

BATCH = 64
"""Most instances whose layers' inputs and derivatives are made together."""

Form = Literal["dense", "layers", "calls"]
"""How rows are held of networks with layers of known form, other than those of linear layers only: ``dense``
where all fit into memory, which pays for rows that are used many times; ``layers``: by what enters and leaves
layers, or formed layer by layer where that is less; ``calls``: never formed."""

Cotangents = Callable[[Tensor, Tensor], Tensor]
"""(outputs ``[n, ...]``, targets ``[n, ...]``) -> vectors in output space ``[n, R, ...]``."""


class InstanceGradients:
    """Rows of instances for one final model.

    Networks of linear layers are differentiated by products of their layers' inputs and deltas, and so are
    layers of known form in others (:mod:`~fimo.curvature.recording`); what is left of their parameters by
    ``torch.func`` in blocks of instances; what can't be vectorised, instance by instance.

    Args:
        final_model: whose trainable parameters are differentiated, in eval mode.
        memory_mb: of one block of rows, and the most that is kept in memory at once as dense rows, or as
            what enters and leaves layers.
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
        self._recorder: Recorder | None = None
        self._tried = False

    def count(self, evaluations: int) -> None:
        """Add to the number of evaluations, for products that don't go through rows."""
        self.evaluations += evaluations

    def losses(self, instances: Instances, form: Form = "dense") -> Rows:
        """Return the gradients of the training loss: R = 1."""
        return self.rows(instances, gradient_of(self.final_model.loss), "loss", form=form)

    def measurements(self, instances: Instances, form: Form = "dense") -> Rows:
        """Return the gradients of what is explained on test instances: R = 1."""
        loss = self.final_model.measurement or self.final_model.loss
        return self.rows(instances, gradient_of(loss), "measurement", form=form)

    def outputs(self, instances: Instances, form: Form = "dense") -> Rows:
        """Return the Jacobians of the outputs: R = D, the number of (flattened) outputs."""
        return self.rows(instances, _identity, "outputs", form=form)

    def gauss_newton(self, instances: Instances, form: Form = "dense") -> Rows:
        """Return the rows A with ``A^T A = sum_i J_i^T H_i J_i``, H_i the loss's Hessian in the outputs.

        R is D, or less where every H_i lacks rank (D - 1 for cross-entropy).
        """
        return self.rows(instances, self.final_model.loss.hessian_root, "gauss_newton", form=form)

    def sampled(self, instances: Instances, samples: int = 1, seed: int = 0, form: Form = "dense") -> Rows:
        """Return rows A with ``E[A^T A] = sum_i J_i^T H_i J_i``: gradients for targets that the model draws.

        R is the number of samples; each is divided by its square root.
        """
        loss, generator = self.final_model.loss, torch.Generator(self.device)

        def cotangents(f: Tensor, y: Tensor) -> Tensor:
            return loss.sampled_gradients(f, y, samples, generator)

        name = f"sampled-{samples}-{seed}"
        return self.rows(instances, cotangents, name, lambda: generator.manual_seed(seed), form)

    def rows(
        self,
        instances: Instances,
        cotangents: Cotangents,
        name: str,
        before: Callable[[], object] = lambda: None,
        form: Form = "dense",
    ) -> Rows:
        """Return the Jacobians of instances applied to cotangents.

        Args:
            name: of the kind of rows, part of a cached block's key.
            before: called before each pass over the instances (to seed a generator).
            form: see :data:`Form`.
        """
        layers = layers_on(self.final_model, instances)
        r = self._row_count(instances, cotangents, before)
        if layers is not None:
            return self._factored(instances, layers, cotangents, before, r)
        block = max(1, int(self.memory / (self.p * r * self.dtype.itemsize)))
        if form != "dense" or len(instances) > block:
            recorded = self._recorded(instances, cotangents, before, r, form)
            if recorded is not None:
                return recorded
        stream = self._stream(instances, cotangents, name, before, block, r)
        if len(instances) <= block:
            return DenseRows(stream.dense(), self.shapes)
        if len(instances) * self.p * r * self.storage.itemsize <= self.memory:
            kept = [b.to(self.storage) for b in stream.blocks()]
            return StreamedRows(lambda: iter(kept), len(instances), r, self.shapes, self.dtype, self.device)
        if self.cache is None:
            size = len(instances) * self.p * r * self.dtype.itemsize
            each = f", all of them for each block of {block} where two sets are multiplied"
            others = ", its storage=bfloat16 or its cache=FOLDER"
            self._tell(f"gradients of {len(instances)} instances", size, each, others)
        return stream

    def _row_count(self, instances: Instances, cotangents: Cotangents, before: Callable[[], object]) -> int:
        probe = self.final_model.outputs(instances[:1])
        before()
        return cotangents(probe, instances.targets[:1]).shape[1]

    def _tell(self, what: str, size: float, when: str = "", others: str = "") -> None:
        """Say, once, that rows take more than the memory."""
        if not self._told:
            self._told = True
            log.info(
                "%s take %.1f GiB, more than memory_mb=%.0f: they are computed again whenever they are used"
                "%s; methods.NAME.memory_mb=%d for the method NAME%s saves that",
                what, size / 2**30, self.memory / 2**20, when, math.ceil(size / 2**20), others,
            )  # fmt: skip

    def _recorded(
        self,
        instances: Instances,
        cotangents: Cotangents,
        before: Callable[[], object],
        r: int,
        form: Form,
    ) -> Rows | None:
        """Return rows by what enters and leaves layers, kept in memory where they fit."""
        recorder = self._known_layers(instances)
        if recorder is None:
            return None
        each = recorder.bytes_each * r + (self.p - self._covered) * r * self.dtype.itemsize
        window = int(max(1, self.memory / 4 / each))
        size = min(BATCH, window)

        def blocks() -> Iterator[Rows]:
            before()
            for some in instances.batches(window):
                block: Rows = self._arranged(recorder, some, cotangents, size)
                if form != "calls" and isinstance(block, ModuleRows | ArrangedRows):
                    block = block.formed()
                yield block

        if len(instances) <= window:
            return next(blocks())
        make = blocks
        if len(instances) * each <= self.memory:
            kept = list(blocks())

            def make() -> Iterator[Rows]:
                return iter(kept)
        else:
            what = f"inputs and derivatives of layers of {len(instances)} instances"
            self._tell(what, len(instances) * each)
        return StreamedRows(make, len(instances), r, self.shapes, self.dtype, self.device)

    def _known_layers(self, instances: Instances) -> Recorder | None:
        """Return the recorder of the network's layers, tried once; None where dense rows are asked for."""
        if self.cache is not None or self.storage != self.dtype:
            return None
        if not self._tried:
            self._tried, self._recorder = True, recorder_for(self.final_model, instances)
            recorded = self._recorder.names if self._recorder is not None else set()
            self._covered = sum(self.shapes[name].numel() for name in recorded)
        return self._recorder if 2 * self._covered >= self.p else None

    def _arranged(self, recorder: Recorder, some: Instances, cotangents: Cotangents, size: int) -> Rows:
        """Return rows made in batches, of instances of about the same length: little of them is padding."""
        if len(some) <= size:
            return self._block(recorder, some, cotangents)
        lengths = _lengths(some)
        order = (
            torch.arange(len(some), device=self.device) if lengths is None else lengths.argsort(stable=True)
        )
        parts = [self._block(recorder, some[at], cotangents) for at in order.split(size)]
        return ArrangedRows(tuple(parts), order.argsort())

    def _block(self, recorder: Recorder, batch: Instances, cotangents: Cotangents) -> ModuleRows | DenseRows:
        """Return the rows of some instances; those of parameters outside of the known layers are formed."""
        vectors: list[Tensor] = []

        def drawn(outputs: Tensor) -> Tensor:
            vectors.append(cotangents(outputs, batch.targets))
            return vectors[0]

        try:
            rows = recorder.rows(batch, drawn)
        except UnseenError as error:  # a network whose calls depend on its inputs
            log.info("gradients of some instances are not taken by layers: %s", error)
            found = vectors[0] if vectors else cotangents(self.final_model.outputs(batch), batch.targets)
            return DenseRows(self._jacobian_products(batch, found, self.parameters), self.shapes)
        self.evaluations += vectors[0].shape[0] * vectors[0].shape[1]
        others = {n: p for n, p in self.parameters.items() if n not in recorder.names}
        if not others:
            return rows
        shapes = {n: p.shape for n, p in others.items()}
        formed = split(self._jacobian_products(batch, vectors[0], others), shapes)
        calls = [FormedCall((n,), -1, v, shapes[n][0] if shapes[n] else 1) for n, v in formed.items()]
        return ModuleRows((*rows.calls, *calls), self.shapes, rows.mask)

    def _factored(
        self,
        instances: Instances,
        layers: list[Layer],
        cotangents: Cotangents,
        before: Callable[[], object],
        r: int,
    ) -> Rows:
        """Return rows as factors, in blocks that are made whenever they are used where all take too much."""
        widths = [self.final_model.network.get_parameter(layer.weight).shape for layer in layers]
        size = sum(entering + r * leaving for leaving, entering in widths) * self.dtype.itemsize

        def blocks(window: int) -> Iterator[Rows]:
            before()
            for some in instances.batches(window):
                yield self._factors(some, layers, cotangents)

        if len(instances) * size <= self.memory:
            return next(blocks(len(instances)))
        self._tell(f"what enters and leaves layers for {len(instances)} instances", len(instances) * size)
        window = max(1, int(self.memory / 4 / size))
        return StreamedRows(lambda: blocks(window), len(instances), r, self.shapes, self.dtype, self.device)

    def _factors(self, instances: Instances, layers: list[Layer], cotangents: Cotangents) -> FactoredRows:
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
        recorder = self._known_layers(instances)
        if recorder is not None:
            dense = [self._block(recorder, b, cotangents).dense() for b in instances.batches(BATCH)]
            return dense[0] if len(dense) == 1 else torch.cat(dense)
        vectors = cotangents(self.final_model.outputs(instances), instances.targets)
        self.evaluations += vectors.shape[0] * vectors.shape[1]
        return self._jacobian_products(instances, vectors, self.parameters)

    def _jacobian_products(
        self, instances: Instances, vectors: Tensor, parameters: dict[str, Tensor]
    ) -> Tensor:
        """Return ``[n, R, P]`` of some parameters, by ``torch.func`` where it can be vectorised."""
        if self.vectorise:
            try:
                with plain_attention():
                    return vmap(functools.partial(self._one, parameters))(instances.inputs, vectors)
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


def _lengths(instances: Instances) -> Tensor | None:
    """Return the number ``[n]`` of each instance's positions that are no padding; None where none is."""
    mask = instances.inputs.get("attention_mask") if isinstance(instances.inputs, dict) else None
    return None if mask is None or mask.ndim != 2 or bool(mask.all()) else mask.sum(1)


def _identity(outputs: Tensor, targets: Tensor) -> Tensor:
    n, shape = outputs.shape[0], outputs.shape[1:]
    identity = torch.eye(shape.numel(), dtype=outputs.dtype, device=outputs.device)
    return identity.view(1, shape.numel(), *shape).expand(n, -1, *shape)
