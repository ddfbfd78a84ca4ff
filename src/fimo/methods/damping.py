"""Damping: the number added to every eigenvalue of a curvature matrix, in the units that users think in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.linear_response.phi import times

DampingValue = float | int | str | dict[str, float]
"""A number; ``auto``; ``time_matched``; ``"10x"`` or ``{"relative": 10}``: of the mean squared gradient."""

Kind = Literal["absolute", "relative", "auto", "time_matched"]


SMALLEST = 1e-30
"""Instead of zero; its inverse is finite in float32 as well."""


@dataclass(frozen=True)
class Damping:
    """A damping as configured.

    - ``absolute``: the number itself, in units of the mean training loss per squared parameter.
    - ``relative``: a multiple of the mean squared gradient, the mean over instances and parameters of the
      training loss's squared derivatives (of one layer's, for methods that damp layer by layer).
    - ``auto``: 0.1 times the mean eigenvalue of the curvature in use (Grosse et al., 2023).
    - ``time_matched``: 1 / (sum of the learning rates up to an evaluation point). Gradient flow for a time t
      moves the parameters along an eigenvector with curvature c by (1 - exp(-ct)) / c times the gradient,
      which 1 / (c + 1/t) equals for small and for large ct. One value per evaluation point.
    """

    kind: Kind
    value: float = 0.0

    @classmethod
    def parse(cls, value: DampingValue, key: str = "damping") -> Damping:
        """Read a configured value.

        Raises:
            InputError: it is none of the forms, or not positive.
        """
        if value == "auto":
            return cls("auto")
        if value == "time_matched":
            return cls("time_matched")
        try:
            if isinstance(value, str) and value.strip().endswith("x"):
                parsed = cls("relative", float(value.strip()[:-1]))
            elif hasattr(value, "keys"):
                (name,) = value.keys()
                if name != "relative":
                    raise ValueError(name)
                parsed = cls("relative", float(value["relative"]))  # type: ignore[index]
            else:
                parsed = cls("absolute", float(value))
        except (TypeError, ValueError):
            raise InputError(
                key, f"expected a number, a multiple such as 10x, auto or time_matched but got {value!r}"
            ) from None
        if not 0 < parsed.value < math.inf:
            raise InputError(key, f"expected a positive damping but got {value!r}")
        return parsed

    def resolve(
        self,
        mean_squared_gradient: float,
        mean_eigenvalue: float,
        further_training: FurtherTraining | None = None,
    ) -> Tensor:
        """Return the dampings ``[E]`` (float64), one for each evaluation point if time-matched, else ``[1]``.

        Raises:
            InputError: it is time-matched and there is no further training.
        """
        if self.kind == "time_matched":
            if further_training is None:
                raise InputError("damping", "time_matched needs further training, but none was given")
            return 1 / training_time(further_training, mean_squared_gradient)
        if self.kind == "relative":
            damping = self.value * mean_squared_gradient
        elif self.kind == "auto":
            damping = 0.1 * mean_eigenvalue
        else:
            damping = self.value
        # a model that fits perfectly has no gradients and, with some losses, no curvature
        return torch.tensor([max(damping, SMALLEST)], dtype=torch.float64)


def training_time(further_training: FurtherTraining, mean_squared_gradient: float) -> Tensor:
    """Return the time ``[E]`` of gradient flow that each evaluation point corresponds to.

    SGD: the sum of the learning rates so far, divided by 1 - momentum. Adam: divided by the root of its
    second moment, taken as the mean squared gradient of a batch near a minimum, which is that of an instance
    divided by the batch size.
    """
    protocol = further_training.protocol
    time = torch.tensor(times(protocol, further_training.steps), dtype=torch.float64)
    return time / protocol.update_rule.pace(mean_squared_gradient / protocol.batch_size)
