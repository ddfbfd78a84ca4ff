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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.arranged_rows import ArrangedRows
from fimo.curvature.automatic import AutomaticRows
from fimo.curvature.cotangents import Cotangents, DrawnGradients, GradientOf, identity
from fimo.curvature.jacobian import DenseRows, FactoredRows, LayerFactors, Rows, StreamedRows, split
from fimo.curvature.module_rows import FormedCall, ModuleRows
from fimo.curvature.recording import Recorder, UnseenError, recorder_for
from fimo.curvature.shared_rows import T, shared_at
from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel
from fimo.models.linear_layers import Layer, backward, forward, layers_on, slopes_of
from fimo.models.vocabulary import NotReachedError
from fimo.store.files import Store, read_tensors, write_tensors
from fimo.store.fingerprint import folder_of, gradients_key

log = logging.getLogger(__name__)

BATCH = 64
"""Most instances whose layers' inputs and derivatives are made together."""

WINDOW = 512
"""Most instances that are put in order of their length together, where rows of all are kept in memory."""

Blocks = tuple[Rows, ...]
"""Consecutive instances' rows in memory."""

Form = Literal["dense", "layers", "calls"]
"""How rows are held of networks with layers of known form, other than those of linear layers only: ``dense``
where all fit into memory, which pays for rows that are used many times; ``layers``: by what enters and leaves
layers, or formed layer by layer where that is less; ``calls``: never formed."""


class InstanceGradients:
    """Rows of instances for one final model.

    Networks of linear layers are differentiated by products of their layers' inputs and deltas, and so are
    layers of known form in others (:mod:`~fimo.curvature.recording`); what is left of their parameters by
    ``torch.func`` in blocks of instances; what can't be vectorised, instance by instance.

    Rows that all fit into memory are taken from those that a run's methods share, where there are any
    (:mod:`~fimo.curvature.shared_rows`).

    Args:
        final_model: whose trainable parameters are differentiated, in eval mode.
        memory_mb: of one block of rows, and the most that is kept in memory at once as dense rows, or as
            what enters and leaves layers.
        storage: dtype in which dense rows are kept or cached (``torch.bfloat16`` halves float32); they are
            computed, and converted back before any product, in the final model's own. None: the same.
        cache: a folder for blocks of rows too large for memory, read back instead of computed again.

    Attributes:
        evaluations: gradients (or products of one instance's Jacobian) computed so far, shared ones included.
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
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self.p = sum(p.numel() for p in self.parameters.values())
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.memory, self.storage = memory_mb * 2**20, storage or first.dtype
        self.cache = Path(cache) if cache is not None else None
        self.evaluations = 0
        self.automatic = AutomaticRows(final_model)
        self._told = False
        self._recorder: Recorder | None = None
        self._tried = False

    def count(self, evaluations: int) -> None:
        """Add to the number of evaluations, for products that don't go through rows."""
        self.evaluations += evaluations

    def losses(self, instances: Instances, form: Form = "dense") -> Rows:
        """Return the gradients of the training loss: R = 1."""
        return self.rows(instances, GradientOf(self.final_model.loss), "loss", form=form)

    def measurements(self, instances: Instances, form: Form = "dense") -> Rows:
        """Return the gradients of what is explained on test instances: R = 1."""
        loss = self.final_model.measurement or self.final_model.loss
        return self.rows(instances, GradientOf(loss), "measurement", form=form)

    def outputs(self, instances: Instances, form: Form = "dense") -> Rows:
        """Return the Jacobians of the outputs: R = D, the number of (flattened) outputs."""
        return self.rows(instances, identity, "outputs", form=form)

    def gauss_newton(self, instances: Instances, form: Form = "dense") -> Rows:
        """Return the rows A with ``A^T A = sum_i J_i^T H_i J_i``, H_i the loss's Hessian in the outputs.

        R is D, or less where every H_i lacks rank (D - 1 for cross-entropy).
        """
        return self.rows(instances, self.final_model.loss.hessian_root, "gauss_newton", form=form)

    def sampled(self, instances: Instances, samples: int = 1, seed: int = 0, form: Form = "dense") -> Rows:
        """Return rows A with ``E[A^T A] = sum_i J_i^T H_i J_i``: gradients for targets that the model draws.

        R is the number of samples; each is divided by its square root.
        """
        drawn = DrawnGradients(self.final_model.loss, samples, seed, self.device)
        return self.rows(instances, drawn, f"sampled-{samples}-{seed}", drawn.restart, form)

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
        r = self._row_count(instances, cotangents, before)
        asked = _Asked(instances, cotangents, name, before, r)
        layers = layers_on(self.final_model, instances)
        if layers is not None:
            return self._factored(asked, layers)
        recorder = self._known_layers(instances)
        block = max(1, int(self.memory / (self.p * r * self.dtype.itemsize)))
        if recorder is not None:
            recorded = functools.partial(self._recorded, asked, recorder, form)
            if form != "dense" or asked.n > block:
                return recorded()
            windows = self._windows(asked, recorder)
            kind: tuple[object, ...] = (windows.most, windows.batch, recorder.modules, recorder.axes)
            return self._dense_rows(asked, kind, lambda: recorded().dense())
        stream = self._stream(asked, block)
        if asked.n <= block:
            return self._dense_rows(asked, (), stream.dense)
        size = asked.n * self.p * r
        if size * self.storage.itemsize <= self.memory:

            def stored() -> Blocks:
                return tuple(b.to(self.storage) for b in stream.blocks())

            kept = self._kept(asked, ("stored", self.storage, block), size * self.storage.itemsize, stored)
            return self._streamed(asked, lambda: iter(kept))
        if self.cache is None:
            each = f", all of them for each block of {block} where two sets are multiplied"
            others = ", its storage=bfloat16 or its cache=FOLDER"
            self._tell(f"gradients of {asked.n} instances", size * self.dtype.itemsize, each, others)
        return stream

    def _row_count(self, instances: Instances, cotangents: Cotangents, before: Callable[[], object]) -> int:
        probe = self.final_model.outputs(instances[:1])
        before()
        return cotangents(probe, instances.targets[:1]).shape[1]

    def kept(
        self,
        what: str,
        instances: Instances,
        kind: tuple[object, ...],
        make: Callable[[], tuple[T, ...]],
        size: float = 0.0,
    ) -> tuple[T, ...]:
        """Return what ``make`` does of the instances' rows, or what it did for another method of a run.

        Args:
            what: it is, in words, more than one.
            kind: what it depends on besides final model and instances.
            make: returns dataclasses with tensors, which nobody changes.
            size: bytes that it takes, as far as that is known.
        """
        shared = shared_at(self.final_model)
        if shared is None or self.cache is not None:
            return make()
        before = self.evaluations

        def made() -> tuple[tuple[T, ...], int]:
            start = self.evaluations
            return make(), self.evaluations - start

        found, evaluations = shared.kept(what, instances, kind, size, self.memory, made)
        self.evaluations = before + evaluations
        return found

    def _kept(
        self, asked: _Asked, kind: tuple[object, ...], size: float, make: Callable[[], Blocks]
    ) -> Blocks:
        """Return rows in memory; ``kind`` is what they depend on besides what is asked for."""
        what = f"{asked.name} gradients of {asked.n} instances"
        return self.kept(what, asked.instances, (asked.cotangents, *kind), make, size)

    def arrangement(self, instances: Instances) -> tuple[object, ...]:
        """Return what the order of sums over these and other instances' rows depends on."""
        recorder = self._known_layers(instances)
        by_layers = () if recorder is None else (recorder.modules, recorder.axes)
        return (self.memory, self.storage, *by_layers)

    def _dense_rows(self, asked: _Asked, kind: tuple[object, ...], dense: Callable[[], Tensor]) -> Rows:
        size = asked.n * self.p * asked.r * self.dtype.itemsize
        (rows,) = self._kept(asked, ("dense", *kind), size, lambda: (DenseRows(dense(), self.shapes),))
        return rows

    def _streamed(self, asked: _Asked, blocks: Callable[[], Iterator[Rows]]) -> StreamedRows:
        return StreamedRows(blocks, asked.n, asked.r, self.shapes, self.dtype, self.device)

    def _tell(self, what: str, size: float, when: str = "", others: str = "") -> None:
        """Say, once, that rows take more than the memory."""
        if not self._told:
            self._told = True
            log.info(
                "%s take %.1f GiB, more than memory_mb=%.0f: they are computed again whenever they are used"
                "%s; methods.NAME.memory_mb=%d for the method NAME%s saves that",
                what, size / 2**30, self.memory / 2**20, when, math.ceil(size / 2**20), others,
            )  # fmt: skip

    def _recorded(self, asked: _Asked, recorder: Recorder, form: Form) -> Rows:
        """Return rows by what enters and leaves layers, kept in memory where they fit."""
        windows = self._windows(asked, recorder)

        def blocks() -> Iterator[Rows]:
            asked.before()
            for some in asked.instances.batches(windows.most):
                yield self._arranged(recorder, some, asked.cotangents, windows.batch, form != "calls")

        if not windows.fit:
            self._tell(f"inputs and derivatives of layers of {asked.n} instances", windows.bytes)
            return self._streamed(asked, blocks)
        form = "calls" if form == "calls" else "layers"
        kind = (form, windows.most, windows.batch, recorder.modules, recorder.axes)
        kept = self._kept(asked, kind, windows.bytes, lambda: tuple(blocks()))
        return kept[0] if len(kept) == 1 else self._streamed(asked, lambda: iter(kept))

    def _windows(self, asked: _Asked, recorder: Recorder) -> _Windows:
        each = (recorder.bytes_each + (self.p - self._covered) * self.dtype.itemsize) * asked.r
        most = max(1, int(self.memory / 4 / each))
        fit = asked.n * each <= self.memory or asked.n == 1
        # of rows in memory, a number that is the same for all methods, though they measure `each` on others
        whole = max(WINDOW, -(-asked.n // 4))
        return _Windows(asked.n * each, fit, whole if fit else most, min(BATCH, most))

    def _known_layers(self, instances: Instances) -> Recorder | None:
        """Return the recorder of the network's layers, tried once; None where dense rows are asked for."""
        if self.cache is not None or self.storage != self.dtype:
            return None
        if not self._tried:
            self._tried, self._recorder = True, recorder_for(self.final_model, instances)
            recorded = self._recorder.names if self._recorder is not None else set()
            self._covered = sum(self.shapes[name].numel() for name in recorded)
        return self._recorder if 2 * self._covered >= self.p else None

    def _arranged(
        self, recorder: Recorder, some: Instances, cotangents: Cotangents, size: int, formed: bool
    ) -> Rows:
        """Return rows made in batches, of instances of about the same length: little of them is padding.

        Args:
            formed: whether layers' matrices are, where that is less than what enters and leaves.
        """

        def batch(instances: Instances) -> ModuleRows | DenseRows:
            rows = self._block(recorder, instances, cotangents)
            return rows.formed() if formed and isinstance(rows, ModuleRows) else rows

        if len(some) <= size:
            return batch(some)
        lengths = _lengths(some)
        order = (
            torch.arange(len(some), device=self.device) if lengths is None else lengths.argsort(stable=True)
        )
        return ArrangedRows(tuple(batch(some[at]) for at in order.split(size)), order.argsort())

    def _block(self, recorder: Recorder, batch: Instances, cotangents: Cotangents) -> ModuleRows | DenseRows:
        """Return the rows of some instances; those of parameters outside of the known layers are formed."""
        vectors: list[Tensor] = []

        def drawn(outputs: Tensor) -> Tensor:
            vectors.append(cotangents(outputs, batch.targets))
            return vectors[0]

        others = {n: p for n, p in self.parameters.items() if n not in recorder.names}
        try:
            if not others and isinstance(cotangents, GradientOf):
                short = recorder.losses(batch, cotangents.loss)
                if short is not None:
                    self.evaluations += len(batch)
                    return short
            rows = recorder.rows(batch, drawn)
        except (UnseenError, NotReachedError) as error:  # a network whose calls depend on its inputs
            log.info("gradients of some instances are not taken by layers: %s", error)
            found = vectors[0] if vectors else cotangents(self.final_model.outputs(batch), batch.targets)
            return DenseRows(self.automatic.rows(batch, found, self.parameters), self.shapes)
        self.evaluations += vectors[0].shape[0] * vectors[0].shape[1]
        if not others:
            return rows
        shapes = {n: p.shape for n, p in others.items()}
        formed = split(self.automatic.rows(batch, vectors[0], others), shapes)
        calls = [FormedCall((n,), -1, v, shapes[n][0] if shapes[n] else 1) for n, v in formed.items()]
        return ModuleRows((*rows.calls, *calls), self.shapes, rows.mask)

    def _factored(self, asked: _Asked, layers: list[Layer]) -> Rows:
        """Return rows as factors, in blocks that are made whenever they are used where all take too much."""
        widths = [self.final_model.network.get_parameter(layer.weight).shape for layer in layers]
        each = sum(entering + asked.r * leaving for leaving, entering in widths) * self.dtype.itemsize

        def blocks(window: int) -> Iterator[Rows]:
            asked.before()
            for some in asked.instances.batches(window):
                yield self._factors(some, layers, asked.cotangents)

        size = asked.n * each
        if size <= self.memory:
            return self._kept(asked, ("factors",), size, lambda: tuple(blocks(asked.n)))[0]
        self._tell(f"what enters and leaves layers for {asked.n} instances", size)
        return self._streamed(asked, lambda: blocks(max(1, int(self.memory / 4 / each))))

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

    def _stream(self, asked: _Asked, block: int) -> StreamedRows:
        """Return rows formed by ``torch.func`` in blocks, whenever they are used."""
        instances = asked.instances

        def blocks() -> Iterator[Rows]:
            asked.before()
            folder = self._cached_at(instances, asked.name, block)
            for start, part in zip(range(0, asked.n, block), instances.batches(block), strict=True):
                path = None if folder is None else folder / f"{start}.safetensors"
                if path is not None and path.exists():
                    values = read_tensors(path, self.device)["rows"].to(self.dtype)
                else:
                    values = self._formed(part, asked.cotangents)
                    if path is not None:
                        write_tensors(path, {"rows": values.to(self.storage)})
                        values = values.to(self.storage).to(self.dtype)
                yield DenseRows(values, self.shapes)

        return self._streamed(asked, blocks)

    def _cached_at(self, instances: Instances, name: str, block: int) -> Path | None:
        """Return the folder of a set's cached blocks; None where none is wanted, or can be described."""
        if self.cache is None or len(instances) <= block:
            return None
        settings = {"block": block, "storage": str(self.storage), "dtype": str(self.dtype)}
        store = Store(self.cache)
        return folder_of(
            store, "gradients", lambda: gradients_key(self.final_model, instances, name, settings)
        )

    def _formed(self, instances: Instances, cotangents: Cotangents) -> Tensor:
        """Return ``[n, R, P]`` of one block."""
        vectors = cotangents(self.final_model.outputs(instances), instances.targets)
        self.evaluations += vectors.shape[0] * vectors.shape[1]
        return self.automatic.rows(instances, vectors, self.parameters)


def _lengths(instances: Instances) -> Tensor | None:
    """Return the number ``[n]`` of each instance's positions that are no padding; None where none is."""
    mask = instances.inputs.get("attention_mask") if isinstance(instances.inputs, dict) else None
    return None if mask is None or mask.ndim != 2 or bool(mask.all()) else mask.sum(1)


@dataclass(frozen=True)
class _Asked:
    """Which rows are asked for: arguments of :meth:`InstanceGradients.rows`, and R."""

    instances: Instances
    cotangents: Cotangents
    name: str
    before: Callable[[], object]
    r: int

    @property
    def n(self) -> int:
        return len(self.instances)


@dataclass(frozen=True)
class _Windows:
    """How instances are recorded together.

    Args:
        bytes: that all instances' rows take.
        fit: into memory.
        most: instances that are put in order of their length together.
        batch: of them, made together.
    """

    bytes: float
    fit: bool
    most: int
    batch: int
