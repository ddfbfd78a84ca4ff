"""Optimizers: what the engine, derivatives, the linear response and training ask of each.

An optimizer of a new kind is a class here and its name in :mod:`fimo.engine.settings`. It must know its state
and its step. What it doesn't offer besides (derivatives, a linear step, a clock), methods that need it do
without: they say that they don't apply, and :attr:`Optimizer.underivable` why.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
State = dict[str, Tensors]
"""What a step starts from: ``parameters`` and the optimizer's own tensors, each by parameter name."""


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """A kind of optimizer with its hyperparameters, which are its fields; learning rates are given to steps.

    Args:
        weight_decay: as the kind defines it.
    """

    weight_decay: float = 0.0

    name: ClassVar[str]

    underivable: ClassVar[str | None] = "no derivative of its step is known"
    """Why methods that differentiate steps, follow them linearly or count them as time don't apply."""

    preconditions: ClassVar[bool] = False
    """Whether a step divides the gradient by the root of a second moment."""

    recorded: ClassVar[tuple[str, ...]] = ()
    """Names of the state that trajectories keep besides the parameters."""

    counts_steps: ClassVar[bool] = False
    """Whether a step depends on how many were made before."""

    held_fixed: ClassVar[str | None] = None
    """What of a step depends on the gradient otherwise than linearly, so that the response holds it fixed."""

    # -- steps of the engine

    @property
    @abstractmethod
    def state(self) -> tuple[str, ...]:
        """Names of the tensors that are kept from step to step, each of the parameters' shape."""

    @property
    def is_plain(self) -> bool:
        """Whether a step is parameters - lr * (gradient + weight_decay * parameters), with no state."""
        return False

    @abstractmethod
    def step_(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: float,
        taken: int | Tensor,
    ) -> None:
        """Make a step in place, elementwise; the gradient may be overwritten.

        Args:
            state: by name, as of :attr:`state`; zero before the first step.
            taken: steps with this one; a tensor (float32, without an axis) may be counted on the device.
        """

    @abstractmethod
    def first_step(self, gradient: Tensor, lr: float) -> Tensor:
        """Return how far the first step moves parameters whose gradients have the given sizes."""

    def torch_optimizer(self, parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Return it as torch knows it, for the training of final models."""
        return InPlace(parameters, self, lr)

    # -- derivatives of steps

    def updated(self, state: State, gradient: Tensors, lr: float, taken: int) -> State:
        """Return the state after a step, as a pure function with derivatives."""
        raise NotImplementedError(self.underivable)

    # -- the linear response, on coefficients of gradients

    @property
    def averages(self) -> bool:
        """Whether steps are along an average of gradients."""
        return bool(self.state)

    @property
    def decays(self) -> bool:
        """Whether parameters shrink by themselves, as the response knows it."""
        return self.weight_decay > 0

    @property
    def unanswered(self) -> str | None:
        """What the linear response leaves out besides :attr:`held_fixed`, in words."""
        return None

    def advance_(
        self, change: Tensor, average: Tensor | None, index: Tensor, gradient: Tensor, lr: float, taken: int
    ) -> None:
        """Move a change of parameters linearly, in place, in units of the preconditioner.

        Args:
            change: ``[P, K]``, K changes.
            average: ``[P, K]``, of gradients; None without.
            index, gradient: ``[B]`` and ``[B, K]``, the rows of a gradient that are not zero; one that occurs
                twice counts twice.
            taken: steps with this one.
        """
        raise NotImplementedError(self.underivable)

    def unbiased(self, second_moment: Tensor, taken: int) -> Tensor:
        """Return the estimate of the squared gradient that a second moment after some steps is."""
        raise NotImplementedError(self.underivable)

    def denominator(self, second_moment: Tensor) -> Tensor:
        """Return what a gradient is divided by; only where it :attr:`preconditions`."""
        raise NotImplementedError(self.underivable)

    # -- as gradient flow

    @property
    def flow_decay(self) -> float:
        """The weight decay that acts like damping."""
        return 0.0

    def time(self, rates: Tensor) -> Tensor:
        """Return the time of gradient flow, in the preconditioner's units, for sums of learning rates."""
        raise NotImplementedError(self.underivable)

    def pace(self, mean_square: float) -> float:
        """Return what that time is divided by where gradients of batches have a mean square of so much."""
        raise NotImplementedError(self.underivable)

    def mean_pace(self, diagonal: Tensor) -> float:
        """Return the mean of the preconditioner's diagonal, weighted with squared gradients."""
        raise NotImplementedError(self.underivable)


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """torch.optim.SGD; weight decay is an L2 term of the loss."""

    momentum: float = 0.0
    nesterov: bool = False

    name = "sgd"
    underivable = None

    @property
    def state(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    @property
    def is_plain(self) -> bool:
        return not self.momentum

    def step_(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: float,
        taken: int | Tensor,
    ) -> None:
        # torch.optim's fused kernel: one pass over parameters, gradient and state
        torch._fused_sgd_(
            [parameters], [gradient], list(state.values()), weight_decay=self.weight_decay,
            momentum=self.momentum, lr=lr, dampening=0.0, nesterov=self.nesterov, maximize=False,
            is_first_step=False,
        )  # fmt: skip

    def first_step(self, gradient: Tensor, lr: float) -> Tensor:
        return lr * gradient

    def torch_optimizer(self, parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
        )

    def updated(self, state: State, gradient: Tensors, lr: float, taken: int) -> State:
        names, parameters = list(gradient), state["parameters"]
        gradient = _with_l2(parameters, gradient, self.weight_decay)
        if not self.momentum:
            return {"parameters": {n: parameters[n] - lr * gradient[n] for n in names}}
        momentum = {n: self.momentum * state["momentum"][n] + gradient[n] for n in names}
        along = momentum
        if self.nesterov:
            along = {n: gradient[n] + self.momentum * momentum[n] for n in names}
        return {"parameters": {n: parameters[n] - lr * along[n] for n in names}, "momentum": momentum}

    def advance_(
        self, change: Tensor, average: Tensor | None, index: Tensor, gradient: Tensor, lr: float, taken: int
    ) -> None:
        if average is None:
            if self.weight_decay:
                change.mul_(1 - lr * self.weight_decay)
            change.index_add_(0, index, gradient, alpha=-lr)
            return
        average.mul_(self.momentum).add_(change, alpha=self.weight_decay).index_add_(0, index, gradient)
        if self.nesterov:
            change.mul_(1 - lr * self.weight_decay).index_add_(0, index, gradient, alpha=-lr)
            change.sub_(average, alpha=lr * self.momentum)
        else:
            change.sub_(average, alpha=lr)

    @property
    def flow_decay(self) -> float:
        return self.weight_decay

    def time(self, rates: Tensor) -> Tensor:
        return rates / (1 - self.momentum)

    def pace(self, mean_square: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """torch.optim.Adam; weight decay is an L2 term of the loss, which the response leaves out."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    name = "adam"
    underivable = None
    preconditions = counts_steps = True
    recorded = ("second_moment",)
    held_fixed = "second moment"
    decoupled: ClassVar[bool] = False
    """Whether weight decay shrinks parameters apart from the gradient."""

    @property
    def state(self) -> tuple[str, ...]:
        return ("first_moment", "second_moment")

    def step_(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: float,
        taken: int | Tensor,
    ) -> None:
        fused = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        made = torch.as_tensor(taken, dtype=torch.float32, device=parameters.device)
        fused(
            [parameters], [gradient], [state["first_moment"]], [state["second_moment"]], [], [made], lr=lr,
            beta1=self.betas[0], beta2=self.betas[1], weight_decay=self.weight_decay, eps=self.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def first_step(self, gradient: Tensor, lr: float) -> Tensor:
        return lr * torch.ones_like(gradient)

    def torch_optimizer(self, parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.decoupled else torch.optim.Adam
        return kind(parameters, lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def updated(self, state: State, gradient: Tensors, lr: float, taken: int) -> State:
        names, parameters = list(gradient), state["parameters"]
        if not self.decoupled:
            gradient = _with_l2(parameters, gradient, self.weight_decay)
        beta1, beta2 = self.betas
        first = {n: beta1 * state["first_moment"][n] + (1 - beta1) * gradient[n] for n in names}
        second = {n: beta2 * state["second_moment"][n] + (1 - beta2) * gradient[n].square() for n in names}
        rate, correction = lr / (1 - beta1**taken), (1 - beta2**taken) ** 0.5
        keep = 1 - lr * self.weight_decay if self.decoupled else 1.0
        moved = {
            n: keep * parameters[n] - rate * first[n] / (safe_sqrt(second[n]) / correction + self.eps)
            for n in names
        }
        return {"parameters": moved, "first_moment": first, "second_moment": second}

    @property
    def decays(self) -> bool:
        return self.decoupled and self.weight_decay > 0

    @property
    def unanswered(self) -> str | None:
        return "Adam's L2 term" if self.weight_decay and not self.decoupled else None

    def advance_(
        self, change: Tensor, average: Tensor | None, index: Tensor, gradient: Tensor, lr: float, taken: int
    ) -> None:
        assert average is not None
        beta1 = self.betas[0]
        average.mul_(beta1).index_add_(0, index, gradient, alpha=1 - beta1)
        if self.decays:
            change.mul_(1 - lr * self.weight_decay)
        change.sub_(average, alpha=lr / (1 - beta1**taken))

    def unbiased(self, second_moment: Tensor, taken: int) -> Tensor:
        return second_moment / (1 - self.betas[1] ** taken if taken else 1.0)

    def denominator(self, second_moment: Tensor) -> Tensor:
        return second_moment.sqrt() + self.eps

    def time(self, rates: Tensor) -> Tensor:
        return rates

    def pace(self, mean_square: float) -> float:
        return math.sqrt(mean_square) + self.eps

    def mean_pace(self, diagonal: Tensor) -> float:
        energy = (1 / diagonal.double() - self.eps).square()
        return float((energy * diagonal).sum() / energy.sum().clamp(min=1e-300))


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """torch.optim.AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    name = "adamw"
    decoupled = True


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Lion (Chen et al., 2023, algorithm 2): the sign of an interpolated momentum; decoupled weight decay.

    c_t = beta1 m_t-1 + (1 - beta1) g_t, then theta -= lr (sign(c_t) + weight_decay theta), then
    m_t = beta2 m_t-1 + (1 - beta2) g_t.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    name = "lion"
    underivable = "a step of lion is as long whatever the gradient's size: its derivative is zero or infinite"

    @property
    def state(self) -> tuple[str, ...]:
        return ("momentum",)

    def step_(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: float,
        taken: int | Tensor,
    ) -> None:
        beta1, beta2 = self.betas
        momentum = state["momentum"]
        direction = torch.lerp(gradient, momentum, beta1).sign_()
        if self.weight_decay:
            parameters.mul_(1 - lr * self.weight_decay)
        parameters.sub_(direction, alpha=lr)
        momentum.lerp_(gradient, 1 - beta2)

    def first_step(self, gradient: Tensor, lr: float) -> Tensor:
        return lr * gradient.sign()


KINDS: dict[str, type[Optimizer]] = {kind.name: kind for kind in (SGD, Adam, AdamW, Lion)}
"""By name; the names are those of :data:`fimo.engine.settings.OPTIMIZERS`."""


def make_optimizer(name: str, settings: Mapping[str, Any]) -> Optimizer:
    """Return an optimizer with those of the settings that it has."""
    kind = KINDS[name]
    return kind(**{field.name: settings[field.name] for field in fields(kind) if field.name in settings})


class InPlace(torch.optim.Optimizer):
    """An optimizer that torch has no class of, as one of torch's."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], kind: Optimizer, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.kind = kind

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(taken=0, **{name: torch.zeros_like(p) for name in self.kind.state})
                state["taken"] += 1
                own = {name: state[name] for name in self.kind.state}
                self.kind.step_(p, p.grad, own, group["lr"], state["taken"])
        return loss


def _with_l2(parameters: Tensors, gradient: Tensors, weight_decay: float) -> Tensors:
    if not weight_decay:
        return gradient
    return {n: g + weight_decay * parameters[n] for n, g in gradient.items()}


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at zero is taken as zero (a parameter that never had a gradient)."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
