"""The final model: all that is given of a training run."""

from __future__ import annotations

import fnmatch
import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fimo.data.instances import Inputs, Instances
from fimo.errors import InputError, shortened
from fimo.models.accepted import accepted
from fimo.models.adapted import Adapted
from fimo.models.attention import plain_attention
from fimo.models.copied import copied, duplicate
from fimo.models.loss_function import Loss, LossFunction
from fimo.models.losses import LOSSES, MEASUREMENTS
from fimo.models.precision import own_precision
from fimo.models.state import usual_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinalModel:
    """A trained network with the loss that its further training minimises.

    The network is copied, so that the user's own module is never put into another mode, frozen or
    changed; the copy stays in eval mode (no dropout, frozen batch statistics). Further training's steps run
    in train mode, in copies of their own; see :class:`~fimo.models.train_mode.TrainMode`.

    Args:
        network: maps a batch of inputs to outputs ``[n, ...]``. Of a Hugging Face network the outputs are its
            ``logits`` (and its attention the plain one, which has all derivatives); of a LightningModule what
            ``forward`` returns; of a ``DataParallel`` what it wraps. One in half precision is computed with
            in float32: its gradients' products would be rounded to three digits, or overflow.
        loss: per-instance loss ``(outputs, targets) -> [n]``, or the name of a known one (``mse``).
            Floating-point tensors that it holds, such as class weights, follow the dtype of the outputs.
            None where a Hugging Face network's head says which.
        measurement: what is explained on test instances, of the same form as ``loss``; the loss itself
            when None.
        trainable: name patterns (``fnmatch``) of the parameters that further training moves and that
            attribution differentiates. When empty: those that require a gradient, so that what the user has
            frozen stays frozen; all where none does, as in a network that was frozen to be used.
        accept_poor: say nothing where it predicts worse than a constant; else the log warns of it when it is
            first used (the command line refuses it).

    Raises:
        InputError: no parameter's name matches a pattern of ``trainable``, no such loss, or none given where
            the network does not say which.

    Example:
        >>> network = torch.nn.Linear(2, 1)
        >>> FinalModel(network, "mse").size
        3
    """

    network: nn.Module
    loss: Loss = None  # type: ignore[assignment]  # as given; filled by __post_init__
    measurement: Loss | None = None
    trainable: tuple[str, ...] = ()
    accept_poor: bool = False
    admitted: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)
    """Instances that it was admitted with; see :func:`fimo.validation.admission.admit`."""
    _moved: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    if TYPE_CHECKING:  # what may be given; the fields say what it becomes

        def __init__(
            self,
            network: nn.Module,
            loss: LossFunction | str | None = None,
            measurement: LossFunction | str | None = None,
            trainable: str | Sequence[str] = (),
            accept_poor: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.network, nn.Module):
            kind = type(self.network).__name__
            raise InputError("model.network", f"expected a torch.nn.Module but got {kind}")
        set_attribute = object.__setattr__  # as frozen dataclasses are filled
        network, loss = accepted(self.network, self.loss)
        wrapped = isinstance(network, Adapted) and network is not self.network
        set_attribute(self, "loss", loss)
        with usual_state():
            network = copied(network).eval()
            if wrapped and isinstance(network, Adapted):
                _compute_plain_attention(network)
            kinds = {p.dtype for p in network.parameters() if p.is_floating_point()}
            if kinds and kinds <= {torch.float16, torch.bfloat16}:
                log.info("parameters in half precision are computed with in float32")
                network = network.float()
        names = [name for name, _ in network.named_parameters()]
        if not names:
            raise InputError("model.network", "has no parameter that can be trained")
        frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
        network.requires_grad_(False)
        set_attribute(self, "network", network)
        inside = "network." if wrapped else ""  # patterns are of the user's own names
        set_attribute(self, "trainable", tuple(inside + pattern for pattern in patterns(self.trainable)))
        for pattern in self.trainable:
            if not fnmatch.filter(names, pattern):
                raise InputError(
                    "model.trainable", f"no parameter matches {pattern!r}; there are {shortened(names)}"
                )
        if not self.trainable and 0 < len(frozen) < len(names):
            log.info("%s: not trained, as requires_grad is false", shortened(frozen))
            set_attribute(self, "trainable", tuple(glob.escape(n) for n in names if n not in frozen))
        moved = {n for pattern in self.trainable for n in fnmatch.filter(names, pattern)} or set(names)
        set_attribute(self, "_moved", frozenset(moved))
        first = next(network.parameters())
        for key, known in (("loss", LOSSES), ("measurement", MEASUREMENTS)):
            function = as_loss(getattr(self, key), f"model.{key}", known)
            if function is not None:
                function = function.following(first.device, first.dtype)
            set_attribute(self, key, function)
        if self.loss is None:
            raise InputError("model.loss", "must be given")

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name (tied ones once), detached; θ^f."""
        return {name: p.detach() for name, p in self.network.named_parameters() if name in self._moved}

    def __getstate__(self) -> dict[str, Any]:  # weak references, which are remembered, can't be pickled
        return {**self.__dict__, "admitted": []}

    def state(self) -> dict[str, Tensor]:
        """Return everything that the outputs depend on by name, frozen parameters and buffers included."""
        return {name: t.detach() for name, t in self.network.state_dict().items()}

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers by name (batch statistics, position indices)."""
        return {name: b.detach() for name, b in self.network.named_buffers()}

    @property
    def size(self) -> int:
        """P, the number of trainable parameters."""
        return sum(p.numel() for p in self.parameters().values())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FinalModel:
        """Return a copy on ``device`` in ``dtype``."""
        return FinalModel(
            duplicate(self.network).to(device=device, dtype=dtype),
            self.loss,
            self.measurement,
            self.trainable,
            self.accept_poor,
        )

    @torch.no_grad()
    def outputs(self, instances: Instances, batch_size: int | None = None) -> Tensor:
        """Return the outputs ``[n, ...]``, in batches (of a size that suits the inputs when None)."""
        size = batch_size or fitting_batch(instances)
        return torch.cat([apply(self.network, b.inputs) for b in instances.batches(size)])

    @torch.no_grad()
    def losses(self, instances: Instances, batch_size: int | None = None) -> Tensor:
        """Return the per-instance losses ``[n]``, computed in batches, as :meth:`outputs`."""
        size = batch_size or fitting_batch(instances)
        return torch.cat(
            [self.loss(apply(self.network, b.inputs), b.targets) for b in instances.batches(size)]
        )


def _compute_plain_attention(network: Adapted) -> None:
    """Set a Hugging Face network's attention, in place."""
    inner: Any = network.network
    if hasattr(inner, "set_attn_implementation"):
        before = getattr(inner.config, "_attn_implementation", None)
        network.replaced_attention = None if before == "eager" else before
        inner.set_attn_implementation("eager")


def patterns(trainable: Any) -> tuple[str, ...]:
    """Return name patterns as a tuple; one of them may be given alone."""
    return (trainable,) if isinstance(trainable, str) else tuple(trainable)


def as_loss(loss: Any, key: str, known: Mapping[str, Loss]) -> Loss | None:
    """Return a loss by its name, any function as a loss, and None as it is.

    Raises:
        InputError: with ``key``: no such name, no function, or a class that was not called.
    """
    if isinstance(loss, str):
        if loss not in known:
            raise InputError(key, f"expected a function or one of {', '.join(known)} but got {loss!r}")
        return known[loss]
    if isinstance(loss, type):
        arguments = "" if issubclass(loss, Loss) else "reduction='none'"
        raise InputError(key, f"{loss.__name__} is a class: pass {loss.__name__}({arguments}), called")
    if loss is not None and not callable(loss):
        raise InputError(key, f"expected a function of outputs and targets but got {type(loss).__name__}")
    return None if loss is None else Loss.of(loss)


def fitting_batch(instances: Instances) -> int:
    """Return how many instances to evaluate at once: 4,096 rows, some hundred images, about 64 sentences.

    A token stands for a vector of hundreds of numbers in every layer.
    """
    numbers = 1
    for name, tensor in instances.tensors().items():
        if name != "targets" and len(tensor):
            numbers += tensor[0].numel() * (1 if tensor.is_floating_point() else 256)
    return max(1, min(4096, 2**21 // numbers))


def apply(network: nn.Module, inputs: Inputs) -> Tensor:
    """Call a network on a batch: a tensor as its one argument, a dict by names."""
    with own_precision(network, next((p.dtype for p in network.parameters()), None)):
        outputs: Tensor = network(**inputs) if isinstance(inputs, dict) else network(inputs)
    return outputs


def functional_apply(network: nn.Module, tensors: dict[str, Tensor], inputs: Inputs) -> Tensor:
    """Call a network with its parameters and buffers replaced by ``tensors``, as can be differentiated twice.

    Parameters missing from ``tensors`` keep the network's own values, so a method restricted to some
    parameters passes only those.
    """
    positional, named = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    with plain_attention(), own_precision(network, dtype):
        outputs: Tensor = torch.func.functional_call(network, tensors, positional, named)
    return outputs
