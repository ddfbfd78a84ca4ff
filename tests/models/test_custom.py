"""A user's own network: outputs picked by name, inputs renamed, mistakes named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fimo.errors import InputError
from fimo.models.adapted import Adapted
from fimo.models.final_model import apply


class Returning(nn.Module):
    """Returns what ``kind`` says around a linear layer's outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(3, 2)

    def forward(self, x: Tensor, factor: float = 1.0) -> object:
        y = factor * self.layer(x)
        return {"tensor": y, "object": SimpleNamespace(logits=y), "mapping": {"logits": y}, "tuple": (y, 0)}[
            self.kind
        ]


@pytest.mark.parametrize(
    ("kind", "output"), [("tensor", None), ("object", "logits"), ("mapping", "logits"), ("tuple", 0)]
)
def test_the_named_part_of_what_a_network_returns_is_its_output(kind: str, output: str | int | None) -> None:
    torch.manual_seed(0)
    network, x = Returning(kind), torch.randn(4, 3)
    torch.testing.assert_close(apply(Adapted(network, output), x), network.layer(x))
    renamed = Adapted(network, output, arguments={"factor": 2.0}, rename={"pixels": "x"})
    torch.testing.assert_close(apply(renamed, {"pixels": x}), 2 * network.layer(x))


def test_a_squeezed_output_becomes_a_column() -> None:
    network, x = Returning("tensor"), torch.randn(4, 3)
    squeezed = nn.Sequential(network, nn.Linear(2, 1), nn.Flatten(0))
    assert squeezed(x).shape == (4,)
    column = apply(Adapted(squeezed, column=True), x)
    assert torch.equal(column, squeezed(x)[:, None])

    class Squeezing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.squeeze()  # of a batch of one a number

    assert apply(Adapted(Squeezing(), column=True), torch.ones(1, 1)).shape == (1, 1)
    with pytest.raises(InputError, match=r"column: expected outputs \[n\] but got \(4, 2\)"):
        Adapted(network, column=True)(x)


def test_what_is_no_tensor_or_not_there_is_named() -> None:
    x = torch.randn(1, 3)
    with pytest.raises(InputError, match=r"output: the network returns dict; name the part"):
        Adapted(Returning("mapping"))(x)
    with pytest.raises(InputError, match=r"output: no 'scores' in what the network returns: logits"):
        Adapted(Returning("mapping"), "scores")(x)
    with pytest.raises(InputError, match=r"expected a torch.nn.Module but got int"):
        Adapted(3)  # type: ignore[arg-type]
