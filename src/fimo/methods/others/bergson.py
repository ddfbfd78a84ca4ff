"""bergson's similarity of gradients (Quirke et al., 2026; https://github.com/EleutherAI/bergson)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fimo.curvature.recording import is_transposed, recorder_for
from fimo.data.instances import Instances
from fimo.errors import InputError, shortened
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.others.foreign import ForeignMethod, Positional, coverage, loader
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import LossFunction

if TYPE_CHECKING:
    from bergson import InMemoryCollector

PROBED = 2
"""Instances that layers are tried with."""


class BergsonGradients(ForeignMethod):
    """bergson's inner products, or cosines, of loss gradients that it projects layer by layer.

    score[j, i] = <φ_j, φ_i>, or that divided by |φ_j| |φ_i|. φ has for each linear layer its gradient G as
    L G R^T, with random signs L ``[k, out]`` and R ``[k, in]`` divided by the root of k (of weight and bias
    together, G being ``[out, in + 1]``); without a projection it is ``graddot``, or ``gradcos``, of these
    layers. The losses are the final model's and the measurement: bergson's hooks take any, where its command
    line sums a language model's over the tokens. Products are added up in float32.

    Args:
        dimension: k, of each side of a layer's gradient, 16 as in bergson's TrackStar; 0 for none, bergson's
            own default, which holds the whole gradients of all test instances in memory.
        unit_norm: cosines.
        seed: of the projection.
        batch_size: instances whose gradients are held at once, beside those of the test instances.
    """

    packages = {"bergson": ("bergson",)}  # noqa: RUF012
    needs = "bergson; linear layers, each called once"
    cost = "one projected gradient of each instance"
    use = "to compare with `graddot` and `gradcos`, which have the same formula without a projection"

    def __init__(
        self, dimension: int = 16, unit_norm: bool = False, seed: int = 0, batch_size: int = 64
    ) -> None:
        for name, value, least in (("dimension", dimension, 0), ("batch_size", batch_size, 1)):
            if value < least:
                raise InputError(name, f"expected at least {least} but got {value}")
        self.dimension, self.unit_norm, self.seed, self.batch_size = dimension, unit_norm, seed, batch_size

    def unsupported(self, final_model: FinalModel, train: Instances) -> str | None:
        layers = linear_layers(final_model, train)
        if not layers:
            return "bergson takes linear layers that are called once, and no such layer's weight is trained"
        moved = final_model.parameters()
        moves = {_of(n, "bias") in moved for n, layer in layers.items() if layer.bias is not None}
        return "bergson takes the biases of all layers or of none" if len(moves) == 2 else None

    def notes(self, problem: AttributionProblem) -> tuple[str, ...]:
        return coverage(problem.final_model, linear_layers(problem.final_model, problem.train))

    def import_library(self) -> None:
        import bergson  # noqa: F401

    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        from bergson import GradientProcessor, IndexConfig, InMemoryCollector, PreprocessConfig, Scorer
        from bergson.score.score_writer import InMemorySequenceScoreWriter

        model = problem.final_model
        layers = linear_layers(model, problem.train)
        require_seen(model, problem.train, layers)
        network = Shown(model, problem.train, layers)
        shared = {
            "model": network,
            "cfg": IndexConfig(run_path=""),
            "target_modules": network.shown,
            "processor": GradientProcessor(
                projection_dim=self.dimension, projection_seed=self.seed,
                include_bias=any(_of(name, "bias") in model.parameters() for name in layers),
            ),
        }  # fmt: skip
        preprocess = PreprocessConfig(unit_normalize=self.unit_norm)
        queries = InMemoryCollector(data=problem.test, preprocess_cfg=preprocess, **shared)
        self._collect(queries, problem.test, model.measurement or model.loss)
        writer = InMemorySequenceScoreWriter(len(problem.removed), len(problem.test))
        scorer = Scorer(
            queries.gradients, list(queries.gradients), writer, network.device, problem.dtype,
            unit_normalize=self.unit_norm,
        )  # fmt: skip
        self._collect(
            InMemoryCollector(data=problem.removed, scorer=scorer, **shared), problem.removed, model.loss
        )
        found: Tensor = writer.scores.T
        return found

    def _collect(self, collector: InMemoryCollector, instances: Instances, loss: LossFunction) -> None:
        """Hand a collector the gradients of each instance, batch by batch."""
        start = 0
        for *inputs, targets in loader(instances, self.batch_size):
            with collector.with_batch(), torch.enable_grad():
                losses = loss(collector.model(*inputs), targets)
                losses.sum().backward()
            collector.model.zero_grad()
            collector.process_batch(list(range(start, start + len(targets))), losses=losses)
            start += len(targets)
        collector.teardown()


class Shown(Positional):
    """A copy of a final model's network as bergson expects one, with its device and the layers' names.

    Args:
        layers: names of those whose gradients are taken.
    """

    def __init__(self, final_model: FinalModel, instances: Instances, layers: Iterable[str]) -> None:
        super().__init__(final_model, instances)
        self.shown = set()
        for name in layers:
            parent, _, last = _of("network", name).rpartition(".")
            holder = self.get_submodule(parent)
            setattr(holder, last, OfSequences(getattr(holder, last)))
            self.shown.add(_of("network", name, "layer"))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class OfSequences(nn.Module):
    """A layer whose inputs ``[n, ..., d]`` are made the sequences ``[n, s, d]`` that bergson asks for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x.reshape(len(x), -1, x.shape[-1]))
        return outputs.reshape(*x.shape[:-1], -1).clone()  # an activation in place then changes the clone

    @property
    def weight(self) -> Any:  # of which some networks read the dtype
        return self.layer.weight


def linear_layers(final_model: FinalModel, train: Instances) -> dict[str, nn.Module]:
    """Return the linear layers with a trained weight of their own that are called once, by name.

    Once in a pass over a batch, with a first axis of its instances.
    """
    network, moved = final_model.network, final_model.parameters()
    uses = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    layers = {
        name: module
        for name, module in network.named_modules()
        if (type(module) is nn.Linear or is_transposed(module))
        and _of(name, "weight") in moved
        and uses[id(module.weight)] == 1
    }
    probe = train[:PROBED]
    calls: dict[nn.Module, list[int]] = defaultdict(list)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module].append(len(inputs[0]) if inputs and inputs[0].ndim > 1 else 0)

    handles = [module.register_forward_pre_hook(hook) for module in layers.values()]
    try:
        final_model.outputs(probe, PROBED)
    finally:
        for handle in handles:
            handle.remove()
    return {name: module for name, module in layers.items() if calls[module] == [len(probe)]}


def require_seen(final_model: FinalModel, train: Instances, layers: Iterable[str]) -> None:
    """Check, against automatic differentiation, that hooks on layers see all that their weights are used for.

    Raises:
        InputError: on some of them they do not.
    """
    recorder = recorder_for(final_model, train)
    seen = set() if recorder is None else recorder.names
    names = (_of(layer, own) for layer in layers for own in ("weight", "bias"))
    if unseen := [name for name in names if name in final_model.parameters() and name not in seen]:
        raise InputError(
            "method",
            f"BergsonGradients does not apply: what enters and leaves layers does not give the gradients of "
            f"{shortened(unseen)}",
        )


def _of(*names: str) -> str:
    return ".".join(name for name in names if name)
