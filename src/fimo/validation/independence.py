"""Whether value i of a loss depends on instance i alone: it is tried.

Everything rests on it: an instance is left out by leaving its loss out, and its gradient is taken alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fimo.data.instances import Instances

Evaluate = Callable[[Instances], tuple[Tensor, Tensor]]
"""Instances ``[n]`` -> their outputs ``[n, ...]`` and losses ``[n]``."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of a value's change, as a share of it: rounding of products that the batch's size rearranges."""

DROPOUTS = frozenset(
    f"{name}{suffix}"
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
                 "feature_alpha_dropout")
    for suffix in ("", "_")
)  # fmt: skip


class WithoutDropout(TorchFunctionMode):
    """In this context dropout passes its input on, attention's too.

    Its masks depend on a batch's shape, not on the data, and networks may trim padding that a batch has in
    common.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            query, key, value, mask = (*args, None)[:4]
            return func(query, key, value, **({"attn_mask": mask} | kwargs | {"dropout_p": 0.0}))
        if name == "multi_head_attention_forward":
            kwargs = kwargs | {"training": False}
        return func(*args, **kwargs)


def problem(evaluate: Evaluate, probe: Instances, in_place: bool = False) -> str | None:
    """Return what is wrong with a loss's values, in words; None where value i follows instance i alone.

    Args:
        probe: a few different instances, better more than one.
        in_place: compare instances only where they have the same place in batches of the same size, as random
            numbers go by places.
    """
    n = len(probe)
    outputs, values = evaluate(probe)
    if wrong := _shape_problem(values, n):
        return wrong
    same_outputs, same_values = evaluate(probe)
    if not (same(same_values, values) and same(same_outputs, outputs)):
        return UNSTEADY
    half = max(1, n // 2)
    first, last = list(range(half)), list(range(half, n))
    trials = [(first + [k - half for k in last], first, first)]
    if in_place:
        trials.append(([(k + half) % n for k in first] + last, last, last))
    else:
        trials.append((list(range(n))[::-1], list(range(n))[::-1], list(range(n))))
        trials.append(([n - 1], [n - 1], [0]))
    for rows, expected, at in trials:
        if rows == list(range(n)):
            continue
        their_outputs, theirs = evaluate(probe[rows])
        if wrong := _shape_problem(theirs, len(rows)):
            return wrong
        if not same(theirs[at], values[expected]):
            inside = len(their_outputs) == len(rows) and same(
                _padded(their_outputs[at], outputs), _padded(outputs[expected], their_outputs)
            )
            return MIXING_LOSS if inside else MIXING_NETWORK
    return None


UNSTEADY = "outputs or losses of the same instances change from one call to the next"
MIXING_LOSS = "an instance's value changes with the other instances of a batch"
MIXING_NETWORK = "an instance's outputs change with the other instances of a batch"


def couples(network: nn.Module) -> list[str]:
    """Return the names of batch normalisations that use the batch's own statistics whatever the mode."""
    return [
        name
        for name, m in network.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
    ]


def _shape_problem(values: object, n: int) -> str | None:
    if not isinstance(values, Tensor):
        return f"expected a tensor [n] but got {type(values).__name__}"
    if values.ndim == 0:
        return (
            f"expected one value for each of {n} instances but got one number for all; build the loss with "
            "reduction='none', and average over an instance's own outputs only"
        )
    if values.shape != (n,):
        return (
            f"expected one value for each of {n} instances but got shape {tuple(values.shape)}; average "
            "over an instance's own outputs: .flatten(1).mean(1)"
        )
    if not values.is_floating_point():
        return f"expected floating-point values but got {values.dtype}"
    return None


def _padded(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cut outputs to the shape that both have: networks may trim padding that a batch has in common."""
    if ours.ndim != theirs.ndim:
        return ours
    for axis in range(1, ours.ndim):
        ours = ours.narrow(axis, 0, min(ours.shape[axis], theirs.shape[axis]))
    return ours


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether values are the same but for rounding."""
    if ours.shape != theirs.shape:
        return False
    share = TOLERANCE.get(ours.dtype, 3e-2)
    scale = float(theirs.detach().abs().nan_to_num(0, 0, 0).max()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=share, atol=share * 1e-2 * scale, equal_nan=True)
