"""A user's own network where its outputs or its arguments are not what a plain network's are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fimo.errors import InputError, shortened


class Adapted(nn.Module):
    """A network whose one output of interest is picked from what it returns.

    For networks that return an object (``outputs.logits``), a mapping or a tuple, for those that squeeze a
    single output to ``[n]``, and for arguments that are always the same. Another that returns a tensor needs
    no wrapping.

    Args:
        network: called with an instance's inputs.
        output: name of an attribute or a key, or an index; None where a tensor is returned.
        arguments: further arguments by name, the same for every call, such as ``return_dict: true``.
        rename: names of inputs, as the data set has them, to the network's own.
        column: whether outputs ``[n]`` are made ``[n, 1]``, also where those of a batch of one are a number.

    Attributes:
        replaced_attention: of a Hugging Face network, the attention that plain attention takes the place of.
    """

    def __init__(
        self,
        network: nn.Module,
        output: str | int | None = None,
        arguments: Mapping[str, Any] | None = None,
        rename: Mapping[str, str] | None = None,
        column: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InputError(
                "model.network.network", f"expected a torch.nn.Module but got {type(network).__name__}"
            )
        self.network, self.output, self.column = network, output, column
        self.arguments, self.rename = dict(arguments or {}), dict(rename or {})
        self.replaced_attention: str | None = None

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        renamed = {self.rename.get(name, name): value for name, value in named.items()}
        found = self.network(*inputs, **renamed, **self.arguments)
        if self.output is not None:
            found = self._pick(found)
        if not isinstance(found, Tensor):
            raise InputError(
                "model.network.output", f"the network returns {type(found).__name__}; name the part to use"
            )
        if not self.column:
            return found
        if found.ndim > 1:
            raise InputError(
                "model.network.column", f"expected outputs [n] but got {tuple(found.shape)}; leave column out"
            )
        return found.reshape(-1, 1)

    def _pick(self, found: Any) -> Any:
        if isinstance(self.output, str) and hasattr(found, self.output):
            return getattr(found, self.output)
        try:
            return found[self.output]
        except (KeyError, IndexError, TypeError):
            names = list(found) if isinstance(found, Mapping) else [type(found).__name__]
            raise InputError(
                "model.network.output", f"no {self.output!r} in what the network returns: {shortened(names)}"
            ) from None
