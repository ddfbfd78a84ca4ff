"""The response, corrected by a few real runs without groups of instances."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.dynamics.group_runs import Correction, choose_groups, correct, run_groups
from fimo.errors import InputError
from fimo.methods.response import Response


class CalibratedResponse(Response):
    """The linear response along further training, corrected where real runs show that it isn't enough.

    A few runs leave out a random half of the left-out instances each. They check the response on data that
    the gold standard has no part in (``validation``), scale it, and show the rest of each instance's effect:

        real(group) = a · response(group) + sum over i in the group of z_i + noise,

    score_i = a · response_i + E[z_i | runs] at each evaluation point, with the sizes of noise and z found by
    marginal likelihood: where the response is right it stays as it is, and where further training has gone
    beyond any linear response the runs take over. The group effects of the response are those of leaving
    out the group, not sums.

    Args:
        budget: cost of the group runs, as a share of the runs that the gold standard makes.
        segments, kernels, propagate, max_rows, memory_mb: see :class:`~fimo.methods.response.Response`.
        seed: of the groups.

    Attributes:
        validation: for each evaluation point after :meth:`attribute`, the correlation of the predicted with
            the real effects of groups, and the scale a; None where there were too few runs.
    """

    def __init__(
        self,
        budget: float = 0.04,
        propagate: Literal["outputs", "loss"] = "outputs",
        segments: int = 6,
        kernels: Literal["auto", "own", "shared"] = "auto",
        max_rows: int = 3000,
        memory_mb: float = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__("path", propagate, segments, kernels, max_rows, memory_mb, form="kernel")
        if not 0 <= budget <= 1:
            raise InputError("budget", f"expected a share of 0 to 1 but got {budget}")
        self.budget, self.seed = budget, seed
        self.validation: list[tuple[float, float]] | None = None

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        self.gradient_evaluations, self.validation = 0, None
        count, seeds = len(self.left_out), self.ft.seeds
        runs = int(self.budget * len(seeds) * (count + 1))
        if count < 4 or runs < 8:
            return super().scores(test, left_out)
        followed = seeds[: max(1, runs // 2)]
        groups = choose_groups(
            self.left_out, len(self.train), followed, runs, torch.Generator().manual_seed(self.seed)
        )
        none = groups[followed[0]][:0]
        predicted: list[Tensor] = []
        singles = []
        for found in self.by_seed(test, {s: groups.get(s, none) for s in seeds}):
            singles.append(found[:, :, :count])
            predicted.append(found[:, :, count:])
        mean = self.average(iter(singles)).double()
        real = run_groups(self.final_model, self.train, test, self.ft.protocol, groups)
        made = sum(len(g) for g in groups.values())
        batch = min(self.ft.protocol.batch_size, len(self.train))
        self.gradient_evaluations += made * self.ft.steps[-1] * batch
        return self._corrected(mean, groups, predicted, real)

    def _corrected(
        self, mean: Tensor, groups: dict[int, Tensor], predicted: list[Tensor], real: dict[int, Tensor]
    ) -> Tensor:
        rows = torch.cat(list(groups.values()))
        member = (rows[:, :, None] == self.left_out).any(1)
        block = torch.cat([torch.full((len(g),), s) for s, g in groups.items()])
        expected = torch.cat([p.permute(2, 0, 1) for p in predicted]).cpu()  # [K, E, J]
        found = torch.cat(list(real.values()))
        corrections: list[Correction] = []
        for e in range(len(mean)):
            size = mean[e].cpu() - mean[e].cpu().mean(1, keepdim=True)
            size = size / size.norm(dim=1, keepdim=True).clamp(min=1e-300)
            weight = size.square().mean(0)
            weight = weight + weight.mean().clamp(min=1e-300)
            corrections.append(
                correct(member, block, found[:, e], expected[:, e], weight, len(self.ft.seeds))
            )
        self.validation = [(c.correlation, c.scale) for c in corrections]
        scale = torch.tensor([c.scale for c in corrections], dtype=torch.float64, device=mean.device)
        remainder = torch.stack([c.remainder for c in corrections]).to(mean.device)
        variance = torch.stack([c.variance for c in corrections]).to(mean.device)
        dtype = next(iter(self.final_model.parameters().values())).dtype
        if self.score_sem is not None:
            spread = self.score_sem.double() * scale[:, None, None]
            self.score_sem = (spread.square() + variance).sqrt().to(dtype)
        return (scale[:, None, None] * mean + remainder).to(dtype)
