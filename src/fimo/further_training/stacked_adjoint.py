"""Reverse-mode derivatives of several seeds' full runs at once, of networks of linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting
from fimo.engine.leave_out import Batch
from fimo.engine.optimizers import State, Tensors
from fimo.engine.protocol import DTYPES, Protocol
from fimo.engine.replicas import Replica, even_parts
from fimo.engine.threads import side_by_side
from fimo.further_training.adjoint import TestGradients, adjoint
from fimo.further_training.unrolled_step import FullRun
from fimo.models.final_model import FinalModel
from fimo.models.linear_layers import Linearised, forward

KEPT_BYTES = 2**28
"""Of states of the runs that are followed together."""

LOST_WORK = 2**40
"""Multiplications, minutes of a core, after which runs that are followed together give their derivatives: no
more is lost with a killed process, unless a single run takes longer. Products so large that this matters gain
little by more runs."""


def adjoints(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    protocol: Protocol,
    seeds: Sequence[int],
    weight: Tensor,
    *,
    device: torch.device | str = "cpu",
    done: Callable[[int, Tensor], None] = lambda seed, derivative: None,
) -> Tensor:
    """Differentiate weighted sums of test losses at the end of seeds' full runs in all instances' weights.

    As :func:`~fimo.further_training.adjoint.adjoint` of each seed, which it also falls back to where seeds
    can't be stacked: other networks than linear layers.

    Args:
        weight: ``[M, J]``, of test losses.
        done: is given each seed and its derivatives ``[M, N]`` as soon as they are there, in any order and on
            any thread.

    Returns:
        ``[S, M, N]`` on the device.
    """
    run = FullRun(final_model, train, protocol, seeds[0], None, device)
    workers = torch.get_num_threads() if run.device.type == "cpu" else 1
    if run.layers is None or run.mode.stochastic:
        end = [len(run.points) - 1]

        def of_seed(seed: int) -> Tensor:
            found = adjoint(
                final_model, train, test, protocol, seed, weight=weight, points=end, device=device
            )[0]
            done(seed, found)
            return found

        return torch.stack(side_by_side(of_seed, list(seeds), workers))
    setting = Setting.build(final_model, train, train[:1], protocol, run.device)
    one = 8 * (1 + len(protocol.update_rule.state)) * final_model.size * math.isqrt(run.points[-1])
    most = max(1, KEPT_BYTES // one)
    if run.device.type == "cpu":
        rows = run.points[-1] * protocol.batch_size
        passes = 6 + 5 * len(weight)  # each run is made twice
        most = min(most, max(1, LOST_WORK // (rows * final_model.size * passes)))
    wide = DTYPES[protocol.evaluation_dtype]
    parts, start = [], 0
    for size in even_parts(len(seeds), most, workers):
        parts.append(list(seeds[start : start + size]))
        start += size

    def of_part(part: list[int]) -> Tensor:
        # a network of its own: a call puts parameters in, where another thread's would find them
        start_of = TestGradients(
            final_model.to(run.device, wide), test.to(run.device, wide), "loss", weight.to(run.device, wide)
        )
        with torch.no_grad():
            found = run.rule.of_units(_StackedRuns(run, setting, part).differentiated(start_of))
        for seed, derivative in zip(part, found, strict=True):
            done(seed, derivative)
        return found

    return torch.cat(side_by_side(of_part, parts, workers))


@dataclass(frozen=True)
class _Batch:
    """A step's instances of S runs: ``index`` and ``weight`` ``[S, B + G]``, B of them in the batch."""

    step: int
    index: Tensor
    weight: Tensor
    size: int


class _StackedRuns:
    """The full runs of S seeds as one, their tensors with a leading axis.

    The engine makes the runs; each K-th state is kept, K = sqrt(T), and K at a time are made again.

    Args:
        run: one of them, for all that they share.
        setting: of the engine.
    """

    def __init__(self, run: FullRun, setting: Setting, seeds: Sequence[int]) -> None:
        assert run.layers is not None
        self.run, self.seeds, self.layers = run, seeds, run.layers
        self.chunk = Chunk(setting, [Replica(seed) for seed in seeds])
        self.steps = run.points[-1]
        self.every = max(1, math.isqrt(self.steps))
        inputs = run.train.inputs
        assert isinstance(inputs, Tensor)
        self.rows = inputs.flatten(1)

    def own(self, step: int, batch: Batch) -> _Batch:
        """Return a step's batch of the engine with the instances that the leave-out rule adds losses of."""
        count, extra = len(self.seeds), self.run.extra.expand(len(self.seeds), -1)
        index = batch.index.expand(count, -1) if len(batch.index) == 1 else batch.index[:count]
        weight = torch.cat([batch.weight[:count], torch.zeros_like(extra, dtype=self.run.dtype)], 1)
        return _Batch(step, torch.cat([index, extra], 1), weight, index.shape[1])

    def backwards(self) -> Iterator[tuple[State, _Batch]]:
        """Yield each step's state before it and its batch, from the last to the first.

        States are valid until the next one; the chunk is at the end before the first.
        """
        chunk, kept = self.chunk, []
        for start in range(0, self.steps, self.every):
            kept.append(chunk.state())
            chunk.advance(min(start + self.every, self.steps))
        buffers = {name: torch.empty(self.every, *flat.shape, dtype=flat.dtype, device=flat.device)
                   for name, flat in chunk.buffers().items()}  # fmt: skip
        yield {}, _Batch(self.steps, torch.empty(0), torch.empty(0), 0)
        for segment in reversed(range(len(kept))):
            first = segment * self.every
            count = min(self.every, self.steps - first)
            chunk.restore(kept[segment], first)
            batches = list(islice(chunk.stream.starting_at(first), count))
            chunk.follow(iter(batches))
            for k in range(count):
                for name, flat in chunk.buffers().items():
                    buffers[name][k].copy_(flat)
                if k + 1 < count:
                    chunk.advance(first + k + 1)
            for k in reversed(range(count)):
                state = self.state({name: buffer[k] for name, buffer in buffers.items()})
                yield state, self.own(first + k, batches[k])

    def state(self, flats: Mapping[str, Tensor]) -> State:
        """Return flat buffers by kind and parameter, ``[S, ...]``, sharing memory."""
        count = len(self.seeds)  # a single run has a companion in the engine
        return {
            kind: {name: t[:count] for name, t in self.chunk.network.views(flat).items()}
            for kind, flat in flats.items()
        }

    def differentiated(self, start: TestGradients) -> Tensor:
        """Return derivatives ``[S, M, N]`` of sums of test losses at the end."""
        run, backwards = self.run, self.backwards()
        next(backwards)
        last = self.state(self.chunk.buffers())
        of_seeds = [
            start({n: t[s] for n, t in last["parameters"].items()}, run.dtype)[0]
            for s in range(len(self.seeds))
        ]
        parameters = {n: torch.stack([of_seed[n] for of_seed in of_seeds]) for n in last["parameters"]}
        adjoint = {k: {n: torch.zeros_like(t) for n, t in parameters.items()} for k in last}
        adjoint["parameters"] = parameters
        sums = len(next(iter(parameters.values()))[0])
        found = torch.zeros(len(self.seeds), sums, len(run.train), dtype=run.dtype, device=run.device)
        for state, batch in backwards:
            adjoint, d_losses = self._pulled_back(state, batch, adjoint)
            for s, own in enumerate(d_losses):
                places, derivative = run.rule.in_own_weights(own, batch.weight[s], batch.size)
                found[s].index_add_(1, batch.index[s, places], derivative)
        return found

    def _pulled_back(self, state: State, batch: _Batch, adjoint: State) -> tuple[State, Tensor]:
        """Carry adjoints ``[S, M, ...]`` through a step; return them and losses' derivatives ``[S, M, B]``.

        They may change in place.
        """
        rule, parameters = self.run.protocol.update_rule, state["parameters"]
        loss, targets = self.run.model.loss, self.run.train.targets[batch.index.flatten()]
        passed = forward(self.layers, parameters, self.rows[batch.index])
        outputs = passed.outputs
        slope = loss.gradient(outputs.flatten(0, 1), targets).view_as(outputs)
        at = Linearised.at(self.layers, parameters, passed, batch.weight[:, :, None] * slope)
        through, direction = adjoint, adjoint["parameters"]
        plain = rule.is_plain and self.run.protocol.clip_norm is None
        if not plain:
            gradient = at.gradient()
            through, direction = self._through_update(
                state, {n: gradient[n] for n in parameters}, batch.step, adjoint
            )
        moved = _Moved.along(at, direction)
        d_outputs = moved.outputs.transpose(1, 2)
        curved = loss.hessian_times(outputs.flatten(0, 1), targets, d_outputs.flatten(0, 1))
        cotangents = (batch.weight[:, :, None, None] * curved.view_as(d_outputs)).transpose(1, 2)
        d_losses = torch.einsum("sbd,smbd->smb", slope, moved.outputs)
        if not plain:
            moved.add_curvature(direction, cotangents, through["parameters"], 1.0)
            return through, d_losses
        # with decay c and rate r, (1 - r c) a - r H a
        rate = self.run.protocol.learning_rate(batch.step, self.run.total)
        kept = 1 - rate * rule.weight_decay
        moved.add_curvature(direction, cotangents, direction, -rate / kept)
        if kept != 1:
            for tensor in direction.values():
                tensor.mul_(kept)
        return through, -rate * d_losses

    def _through_update(
        self, state: State, gradient: Tensors, step: int, adjoint: State
    ) -> tuple[State, Tensors]:
        """Return the adjoints of the state before an optimizer's step, and those of its gradient."""

        def of_seed(state: State, gradient: Tensors, adjoint: State) -> tuple[State, Tensors]:
            _, back = vjp(lambda z, g: self.run.update(z, g, step), state, gradient)  # type: ignore[misc]
            found: tuple[State, Tensors] = vmap(back)(adjoint)
            return found

        through, of_gradient = vmap(of_seed)(state, gradient, adjoint)
        return through, of_gradient


@dataclass(frozen=True)
class _Moved:
    """The forward pass's derivatives along few directions of several networks, ``[S, M, B, width]``.

    The R-operator of :class:`~fimo.models.linear_layers.Linearised`, whose layout is for many directions of
    one network, in one that needs no transposed copy of a direction and adds to directions in place.

    Args:
        at: the S networks.
        entering, sums: R a and R z of each layer; None where nothing moves, or where f'' = 0.
        spread: a of each layer, for each direction.
        outputs: R of the networks' outputs.
    """

    at: Linearised
    entering: list[Tensor | None]
    sums: list[Tensor | None]
    spread: list[Tensor]
    outputs: Tensor

    @classmethod
    def along(cls, at: Linearised, directions: Tensors) -> _Moved:
        """Run the forward pass along directions ``[S, M, ...]``: R z = W R a + V a + c, R a' = f' R z."""
        entering: list[Tensor | None] = []
        sums: list[Tensor | None] = []
        spread = []
        pushed: Tensor | None = None
        for k, layer in enumerate(at.layers):
            entering.append(pushed)
            v = directions[layer.weight]
            s, m, out, _ = v.shape
            spread.append(at.entering[k][:, None].expand(-1, m, -1, -1).contiguous())
            z = torch.bmm(spread[-1].flatten(0, 1), v.flatten(0, 1).mT).view(s, -1, out)
            if pushed is not None:
                z.baddbmm_(pushed.flatten(1, 2), at.weights[k].mT)
            z = z.view(s, m, -1, out)
            if layer.bias is not None:
                z += directions[layer.bias][:, :, None]
            slope, bend = at.slopes[k], at.bends[k]
            sums.append(z if bend is not None else None)
            if slope is not None:
                z = z * slope[:, None] if bend is not None else z.mul_(slope[:, None])
            pushed = z
        assert pushed is not None
        return cls(at, entering, sums, spread, pushed)

    def add_curvature(self, directions: Tensors, cotangents: Tensor, into: Tensors, rate: float) -> None:
        """Add a rate times the gradient's derivatives along the directions, which may be what is added to.

        R δ = f' R e + f'' e R z,  R e of the layer before = W^T R δ + V^T δ,  R dW = (R δ)^T a + δ^T R a.

        Args:
            cotangents: R e at the outputs, ``[S, M, B, D]``.
        """
        e = cotangents.contiguous()
        for k in reversed(range(len(self.at.layers))):
            layer, slope, bend, z, ra = (
                self.at.layers[k], self.at.slopes[k], self.at.bends[k], self.sums[k], self.entering[k],
            )  # fmt: skip
            if slope is not None:
                e = e * slope[:, None]
            if bend is not None and z is not None:
                e = e.addcmul(z, bend[:, None])
            s, m, n, out = e.shape
            own = e
            if k:
                delta = self.at.deltas[k][:, None].expand(-1, m, -1, -1).contiguous().view(s * m, n, out)
                e = torch.bmm(e.flatten(1, 2), self.at.weights[k]).view(s * m, n, -1)
                e = e.baddbmm_(delta, directions[layer.weight].flatten(0, 1)).view(s, m, n, -1)
            weight = into[layer.weight].flatten(0, 1)
            weight.baddbmm_(own.flatten(0, 1).mT, self.spread[k].flatten(0, 1), alpha=rate)
            if ra is not None:
                weight.baddbmm_(delta.mT, ra.flatten(0, 1), alpha=rate)
            if layer.bias is not None:
                into[layer.bias].add_(own.sum(2), alpha=rate)
