"""Tensors inside a loss of the user's own (class weights), in the dtype and on the device of the outputs.

Further training's steps and its evaluation run in different dtypes, so such a loss exists once for each:
copies whose tensors are converted, made beforehand, as none may be kept that was made under ``torch.func``.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fimo.errors import InputError

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(outputs ``[n, ...]``, targets ``[n, ...]``) -> one loss per instance ``[n]``."""

WIDTHS = (torch.float32, torch.float64)


class FollowingOutputs:
    """A loss whose own floating-point tensors have the dtype of the outputs that it is given.

    Args:
        loss: the user's, which is not changed: with tensors in its closure, among the globals that it reads,
            in the arguments of a ``functools.partial``, or in attributes (a module's weights).
        device: of the outputs.
        dtypes: of outputs that are to be expected, besides float32 and float64.
    """

    def __init__(
        self, loss: LossFunction, device: torch.device, dtypes: tuple[torch.dtype, ...] = ()
    ) -> None:
        self.loss, self.device = loss, device
        self.copies: dict[torch.dtype, LossFunction] = {
            dtype: converted(loss, device, dtype) for dtype in dict.fromkeys((*WIDTHS, *dtypes))
        }

    def __reduce__(self) -> tuple[Any, ...]:  # copies of functions can't be pickled
        return FollowingOutputs, (self.loss, self.device, tuple(self.copies))

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.copies.get(outputs.dtype, self.loss)(outputs, targets)


def following_outputs(loss: LossFunction, device: torch.device, dtype: torch.dtype) -> LossFunction:
    """Return a loss that follows its outputs' dtype; the loss itself where it holds no tensor."""
    if isinstance(loss, FollowingOutputs):
        loss = loss.loss
    return FollowingOutputs(loss, device, (dtype,)) if any(True for _ in tensors(loss)) else loss


def tensors(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the floating-point tensors that a callable holds, each once."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if thing.is_floating_point():
            yield thing
        return
    for part in _parts(thing).values():
        yield from tensors(part, seen)


def converted(
    thing: Any, device: torch.device, dtype: torch.dtype, made: dict[int, Any] | None = None
) -> Any:
    """Return a copy of a callable with its floating-point tensors converted; itself where it holds none."""
    made = {} if made is None else made
    if id(thing) in made:
        return made[id(thing)]
    if not any(True for _ in tensors(thing)):
        return thing
    if isinstance(thing, Tensor):
        made[id(thing)] = thing.detach().to(device, dtype)
        return made[id(thing)]
    if isinstance(thing, nn.Module):
        twin = copy.deepcopy(thing).requires_grad_(False).to(device, dtype)
        for module in twin.modules():  # tensors that are neither parameters nor buffers stay behind
            plain = {k: v for k, v in vars(module).items() if isinstance(v, Tensor) and v.is_floating_point()}
            vars(module).update({k: v.to(device, dtype) for k, v in plain.items()})
        made[id(thing)] = twin
        return twin
    made[id(thing)] = thing  # what refers to itself keeps referring to the original
    parts = {name: converted(part, device, dtype, made) for name, part in _parts(thing).items()}
    made[id(thing)] = _with_parts(thing, parts)
    return made[id(thing)]


def _parts(thing: Any) -> Mapping[Any, Any]:
    """Return what of a callable, or of a container that it holds, may be tensors or hold them, by name."""
    if isinstance(thing, nn.Module):
        plain = [v for m in thing.modules() for v in vars(m).values() if isinstance(v, Tensor)]
        return dict(enumerate([*plain, *thing.parameters(), *thing.buffers()]))
    if isinstance(thing, functools.partial):
        return {"func": thing.func, "args": thing.args, "keywords": thing.keywords}
    if isinstance(thing, types.MethodType):
        return {"self": thing.__self__, "func": thing.__func__}
    if isinstance(thing, types.FunctionType):
        return _function_parts(thing)
    if isinstance(thing, list | tuple):
        return dict(enumerate(thing))
    if isinstance(thing, dict):
        return thing
    if isinstance(thing, type | types.ModuleType) or not hasattr(thing, "__dict__"):
        return {}
    return vars(thing) if callable(thing) or type(thing).__module__ == "__main__" else {}


def _function_parts(function: types.FunctionType) -> dict[tuple[str, str], Any]:
    if function.__module__ and function.__module__.split(".")[0] in ("torch", "fimo", "numpy"):
        return {}
    code = function.__code__
    found: dict[tuple[str, str], Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found["cell", name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in code.co_names:
        if name in function.__globals__:
            value = function.__globals__[name]
            if isinstance(value, Tensor | types.FunctionType | nn.Module | functools.partial):
                found["global", name] = value
    found["defaults", ""] = function.__defaults__
    found["keywords", ""] = function.__kwdefaults__
    return found


def _with_parts(thing: Any, parts: Mapping[Any, Any]) -> Any:
    if isinstance(thing, functools.partial):
        return functools.partial(parts["func"], *parts["args"], **parts["keywords"])
    if isinstance(thing, types.MethodType):
        return types.MethodType(parts["func"], parts["self"])
    if isinstance(thing, types.FunctionType):
        return _function_with_parts(thing, parts)
    if isinstance(thing, tuple):
        found = tuple(parts.values())
        return type(thing)(*found) if hasattr(thing, "_fields") else found
    if isinstance(thing, list):
        return list(parts.values())
    if isinstance(thing, dict):
        return dict(parts)
    try:
        twin = copy.copy(thing)
    except RecursionError:
        raise InputError(
            "model.loss",
            f"{type(thing).__name__} holds tensors and can't be copied: its __getattr__ asks for itself in a "
            "copy without attributes; let it raise AttributeError for names that begin with __",
        ) from None
    vars(twin).update(parts)
    return twin


def _function_with_parts(function: types.FunctionType, parts: Mapping[Any, Any]) -> types.FunctionType:
    names = function.__code__.co_freevars
    cells = tuple(
        types.CellType(parts["cell", name]) if ("cell", name) in parts else cell
        for name, cell in zip(names, function.__closure__ or (), strict=True)
    )
    changed = {name: value for kind, name in parts if kind == "global" for value in [parts[kind, name]]}
    twin = types.FunctionType(
        function.__code__,
        {**function.__globals__, **changed},
        function.__name__,
        parts["defaults", ""],
        cells or None,
    )
    twin.__kwdefaults__ = parts["keywords", ""]
    twin.__dict__.update(function.__dict__)
    twin.__module__, twin.__qualname__ = function.__module__, function.__qualname__
    return twin
