"""Masks from a generator of their own: PyTorch's to the bit, and one run's whatever runs beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from fimo.models.dropout import DrawnFrom


def inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(33, 40, 16).to(dtype)
    return [x, x.transpose(0, 1), x[0, 0], x[:, ::2], x.new_empty(0, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_are_those_of_the_process_s_generator_with_the_same_seed(dtype: torch.dtype) -> None:
    for x in inputs(dtype):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            expected = [F.dropout(x, 0.3), nn.Dropout(0.1)(x), F.dropout(x.clone(), 0.5, inplace=True)]
            state = torch.get_rng_state()
        before, generator = torch.get_rng_state(), torch.Generator().manual_seed(3)
        with DrawnFrom(generator):
            found = [F.dropout(x, 0.3), nn.Dropout(0.1)(x), F.dropout(x.clone(), 0.5, inplace=True)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(generator.get_state(), state)
        assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_drawn_in_eval_mode_nor_for_rates_of_zero_and_one() -> None:
    x = torch.randn(5)
    generator = torch.Generator()
    before = generator.get_state()
    with DrawnFrom(generator):
        assert F.dropout(x, 0.5, False) is x
        assert nn.Dropout(0.5).eval()(x) is x
        assert F.dropout(x, 0.0) is x
        assert torch.equal(F.dropout(x, 1.0), torch.zeros(5))
        with pytest.raises(ValueError, match=r"between 0 and 1 but got 1\.5"):
            F.dropout(x, 1.5)
    assert torch.equal(generator.get_state(), before)


def test_runs_together_have_the_masks_of_one_alone() -> None:
    x = inputs(torch.float32)[0]
    together = torch.stack([x, 2 * x, x + 1])
    for swapped in (False, True):  # of activations that lie otherwise in memory as well

        def dropped(t: Tensor, swapped: bool = swapped) -> Tensor:
            return F.dropout(t.transpose(0, 1) if swapped else t, 0.3)

        with DrawnFrom(torch.Generator().manual_seed(3)):
            found = vmap(dropped, randomness="same")(together)
        with DrawnFrom(torch.Generator().manual_seed(3)):
            assert torch.equal(found[0], dropped(x))
        assert torch.equal(found[0] == 0, found[1] == 0)
