"""Cutting any network where its first trained module is called.

A network is run on a few instances, and the calls of its modules are noted. A frozen module whose call is
over before any module that owns a trained parameter is called computes the same in every run, whatever the
code around it does. In a copy of the network it is replaced by what it returned for the instances of a batch
(:class:`Returned`); the code between modules runs as it did.

Only values that the rest depends on are kept, which derivatives tell. NaN stands in for the others, so that
a dependency that was missed shows in the outputs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fimo.data.instances import Inputs
from fimo.models.copied import duplicate
from fimo.models.final_model import apply
from fimo.models.padding import trims

INPUTS = "inputs"
"""Name of the inputs of a network that takes one tensor."""


@dataclass(frozen=True)
class Call:
    """What a module was called with and returned.

    Args:
        entering: shapes of the tensors that it was called with, without their first axis.
        kind: of what it returned: None for a tensor, else tuple or list.
        values: what it returned, or the elements of it.
    """

    entering: tuple[torch.Size, ...]
    kind: type | None
    values: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], named: Mapping[str, Any], returned: Any) -> Call | None:
        """Return None where something else than tensors was returned."""
        kind = None if isinstance(returned, Tensor) else type(returned)
        values = (returned,) if kind is None else returned
        if kind not in (None, tuple, list) or not all(v is None or isinstance(v, Tensor) for v in values):
            return None
        return cls(_shapes(args, named), kind, tuple(values))

    def named(self, module: str) -> dict[str, Tensor]:
        """Return the tensors by names of their own."""
        return {f"{module}[{k}]": v for k, v in enumerate(self.values) if v is not None}


class Returned(nn.Module):
    """What a module returned, in its place, once for each time that it is handed over.

    Where the network cuts off columns of padding, what was returned for whole rows is cut as well.

    Raises:
        RuntimeError: it is called with other shapes than those for which it was computed.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.entering, self.kind = call.entering, call.kind
        self.values: tuple[Tensor | None, ...] | None = None

    def hand_over(self, call: Call) -> None:
        """Set what is returned next."""
        self.entering, self.kind, self.values = call.entering, call.kind, call.values

    def forward(self, *args: Any, **named: Any) -> Any:
        assert self.values is not None, "nothing was handed over"
        values, self.values = self.values, None
        shapes = _shapes(args, named)
        if shapes != self.entering:
            width = self._narrower(shapes)
            values = tuple(
                v if v is None else v[:, : width[1]] if v.shape[1] == width[0] else v for v in values
            )
        return values[0] if self.kind is None else self.kind(values)

    def _narrower(self, shapes: tuple[torch.Size, ...]) -> tuple[int, int]:
        """Return the number of columns for which values were computed, and that of the call."""
        widths = {
            (had[0], has[0])
            for had, has in zip(self.entering, shapes, strict=False)
            if had != has and had and has and had[0] > has[0]
        }
        if len(shapes) != len(self.entering) or len(widths) != 1:
            raise RuntimeError(
                f"a frozen module was computed for {self.entering} but is called with {shapes}: "
                "the network's shapes depend on the batch"
            )
        return widths.pop()


@dataclass(frozen=True)
class HandOver:
    """Before a network is called: takes values of frozen modules from its inputs and hands them over.

    Args:
        places: names of each replaced module's values; None for no value.
        shapes, dtypes: of all values and inputs that are not kept.
        each: which of these have a row for each instance.
        kept: names of the values that are among the inputs.
        alone: the network takes one tensor.
    """

    places: dict[str, tuple[str | None, ...]]
    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    each: frozenset[str]
    kept: tuple[str, ...]
    alone: bool

    def __call__(
        self, network: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = {name: named[name] for name in self.kept}
        first = values[self.kept[0]]
        for name, shape in self.shapes.items():
            rows = len(first) if name in self.each else shape[0]
            dtype = first.dtype if first.is_floating_point() else self.dtypes[name]
            missing = torch.full((), torch.nan, dtype=dtype, device=first.device)
            values[name] = missing.expand(rows, *shape[1:])
        for module, names in self.places.items():
            place = network.get_submodule(module)
            place.values = tuple(None if n is None else values[n] for n in names)  # type: ignore[assignment]
        rest = {n: v for n, v in {**values, **named}.items() if "[" not in n}
        return ((rest[INPUTS],), {}) if self.alone else ((), rest)


class Recorder(nn.Module):
    """Computes the new inputs: of the network's own those that are needed still, and what modules return.

    In train mode the replaced modules are, and nothing else.

    Args:
        network: whole.
        replaced: names of modules.
        kept: names of values.
        inputs: names of the network's own inputs that are needed.
    """

    def __init__(
        self, network: nn.Module, replaced: Collection[str], kept: Collection[str], inputs: Collection[str]
    ) -> None:
        super().__init__()
        self.network, self.replaced = untrimmed(network), tuple(replaced)
        self.kept, self.inputs = tuple(kept), tuple(inputs)

    def train(self, mode: bool = True) -> Recorder:
        super().train(False)
        for name in self.replaced:
            self.network.get_submodule(name).train(mode)
        return self

    def forward(self, *args: Tensor, **named: Tensor) -> dict[str, Tensor]:
        own: Inputs = args[0] if args else named
        calls = _recorded(self.network, {name.partition("[")[0] for name in self.kept}, own)
        values = {k: v for module, call in calls.items() for k, v in call.named(module).items()}
        inputs = {INPUTS: own} if isinstance(own, Tensor) else own
        return {**{n: inputs[n] for n in self.inputs}, **{n: values[n] for n in self.kept}}


class CalledOnce:
    """The frozen modules of a network, called once for all copies of the rest: also where they draw masks.

    Args:
        network: whole, in the mode of its calls.
        modules: names of what is called once; see :func:`frozen_modules`.
        inputs: of some instances.
    """

    def __init__(self, network: nn.Module, modules: Collection[str], inputs: Inputs) -> None:
        self.network, self.modules = network, tuple(modules)
        calls = _recorded(network, self.modules, inputs, stop=True)
        memo: dict[int, Any] = {id(network.get_submodule(n)): Returned(call) for n, call in calls.items()}
        self.rest = duplicate(network, memo)

    def call(self, inputs: Inputs) -> dict[str, Call]:
        """Call the frozen modules on a batch."""
        return _recorded(self.network, self.modules, inputs, stop=True)

    def hand_over(self, calls: Mapping[str, Call]) -> nn.Module:
        """Return the rest, which returns what was called, once."""
        for name, call in calls.items():
            place = self.rest.get_submodule(name)
            assert isinstance(place, Returned)
            place.hand_over(call)
        return self.rest


def frozen_modules(network: nn.Module, trainable: Collection[str], inputs: Inputs) -> tuple[str, ...]:
    """Return the names of frozen modules whose call is over before a trained one is called."""
    return tuple(_frozen_calls(network, trainable, inputs))


@dataclass
class _Cut:
    """The calls that are replaced, and which values the rest depends on."""

    network: nn.Module
    inputs: Inputs
    calls: dict[str, Call]
    needed: set[str] = field(default_factory=set)

    @property
    def named(self) -> dict[str, Tensor]:
        return {INPUTS: self.inputs} if isinstance(self.inputs, Tensor) else self.inputs

    @property
    def values(self) -> dict[str, Tensor]:
        """All values of replaced modules."""
        return {k: v for module, call in self.calls.items() for k, v in call.named(module).items()}

    def rest(self, needed: Collection[str]) -> nn.Module:
        """Return a copy of the network that takes the needed values and inputs."""
        places = {name: Returned(call) for name, call in self.calls.items()}
        memo: dict[int, Any] = {id(self.network.get_submodule(n)): place for n, place in places.items()}
        found = duplicate(self.network, memo)
        everything, count = {**self.named, **self.values}, len(next(iter(self.named.values())))
        missing = {n: v for n, v in everything.items() if n not in needed}
        hook = HandOver(
            places={
                name: tuple(None if v is None else f"{name}[{k}]" for k, v in enumerate(call.values))
                for name, call in self.calls.items()
            },
            shapes={n: v.shape for n, v in missing.items()},
            dtypes={n: v.dtype for n, v in missing.items()},
            each=frozenset(n for n, v in missing.items() if v.ndim and len(v) == count),
            kept=tuple(n for n in self.values if n in needed),
            alone=isinstance(self.inputs, Tensor),
        )
        found.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        return found

    def find_needed(self) -> None:
        """Find what the outputs depend on; of what has no derivatives, all is taken to be needed."""
        everything = {**self.named, **self.values}
        smooth = {n: v.detach().requires_grad_() for n, v in everything.items() if v.is_floating_point()}
        with torch.enable_grad():
            outputs = self.rest(everything)(**{**everything, **smooth})
            gradients = torch.autograd.grad(outputs.sum(), list(smooth.values()), allow_unused=True)
        without = {n for n, g in zip(smooth, gradients, strict=True) if g is None}
        self.needed = everything.keys() - without

    def leave_whole(self) -> bool:
        """Give up modules with needed values that have no row for each instance; return whether any."""
        count = len(next(iter(self.named.values())))
        spread = [
            module
            for module, call in self.calls.items()
            if any(
                n in self.needed and (not v.ndim or len(v) != count) for n, v in call.named(module).items()
            )
        ]
        for module in spread:
            del self.calls[module]
        return bool(spread)


def cut_at_calls(
    network: nn.Module, trainable: Collection[str], inputs: Inputs, keep_all: bool = False
) -> tuple[nn.Module, nn.Module] | None:
    """Cut a network before its first trained module; return what computes the new inputs, and the rest.

    Whether the rest gives the whole network's outputs is for the caller to try, with other values of the
    trained parameters than those given.

    Args:
        network: in eval mode.
        trainable: names of the parameters that are trained; the rest keeps them.
        inputs: of some instances, at least two.
        keep_all: keep all values, also those that outputs seem not to depend on.

    Returns:
        A network whose outputs are new inputs by name, and a copy of the network that takes them; None where
        no frozen module is called before the first trained one, or none of their values has a row for each
        instance.
    """
    whole = untrimmed(network)
    found = _Cut(whole, inputs, _frozen_calls(whole, trainable, inputs))
    if len(next(iter(found.named.values()))) < 2:
        return None
    while found.calls:
        found.find_needed()
        if keep_all:
            found.needed |= {*found.named, *found.values}
        if not found.leave_whole():
            break
    kept = [n for n in found.values if n in found.needed]
    if not kept:
        return None
    recorder = Recorder(whole, found.calls, kept, [n for n in found.named if n in found.needed])
    found.network = network
    return recorder, found.rest(found.needed)


def untrimmed(network: nn.Module) -> nn.Module:
    """Return a network that doesn't cut off columns of padding, where it would."""
    if not trims(network):
        return network
    found = copy.copy(network)
    found.trims = False  # type: ignore[assignment]
    return found


def _frozen_calls(network: nn.Module, trainable: Collection[str], inputs: Inputs) -> dict[str, Call]:
    """Return the calls of the largest frozen modules that are over before a trained one is called."""
    moving = {id(p) for n, p in network.named_parameters(remove_duplicate=False) if n in trainable}
    names = Counter(id(m) for _, m in network.named_modules(remove_duplicate=False))
    frozen = {
        name
        for name, m in network.named_modules()
        if names[id(m)] == 1 and not any(id(p) in moving for p in m.parameters())
    }
    owners = [m for m in network.modules() if any(id(p) in moving for p in m.parameters(recurse=False))]
    calls = _recorded(network, frozen, inputs, until=owners)
    return {n: c for n, c in calls.items() if not any(n.startswith(f"{other}.") for other in calls)}


class _AllCalledError(Exception):
    """All that was asked for has been called."""


@torch.no_grad()
def _recorded(
    network: nn.Module,
    names: Collection[str],
    inputs: Inputs,
    until: Collection[nn.Module] = (),
    stop: bool = False,
) -> dict[str, Call]:
    """Run a network and return the calls of modules that are called once.

    Args:
        until: modules before whose first call the others' must be over.
        stop: end when all have been called.
    """
    found: dict[str, Call] = {}
    times: Counter[str] = Counter()
    reached: list[nn.Module] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], returned: Any) -> None:
            times[name] += 1
            call = Call.of(args, named, returned)
            if call is not None and not reached:
                found[name] = call
            if stop and len(found) == len(names):
                raise _AllCalledError

        return hook

    handles = [m.register_forward_pre_hook(lambda m, _: reached.append(m)) for m in until]
    handles += [network.get_submodule(n).register_forward_hook(note(n), with_kwargs=True) for n in names]
    try:
        apply(network, inputs)
    except _AllCalledError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: call for name, call in found.items() if times[name] == 1}


def _shapes(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[torch.Size, ...]:
    return tuple(t.shape[1:] for t in [*args, *named.values()] if isinstance(t, Tensor))
