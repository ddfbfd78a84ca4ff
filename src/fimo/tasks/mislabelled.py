"""Detection of labels that were flipped before the final model was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor

from fimo.audit.suspects import inapplicable, suspects
from fimo.errors import InputError
from fimo.evaluation.label_errors import detection, flip_labels, suspicion
from fimo.tasks.base import Judged, Task, better, seeds_of

KEY = "evaluation.tasks.mislabelled"
GOLD_STANDARD = "further training"
"""The row of the sensitivity itself: what a perfect attribution would find."""

OWN_LOSS = "own loss"
"""The row of the final model's loss on the instance itself."""

CLEANLAB = "cleanlab"
"""The row of cleanlab's label quality score, the self-confidence (Northcutt et al., 2021): the probability of
an instance's label by a model that was trained without its fold. Its order is that of the loss."""

SUSPECTS = "suspects"
"""The row of what an audit lists (:mod:`fimo.audit.suspects`)."""

FOLDS = 5
"""Of cleanlab's cross-validation."""


class Mislabelled(Task):
    """Flip labels, train a final model on them, and see whose scores find them among candidates.

    Args:
        share: of the training set's labels that are flipped.
        candidates: how many training instances, evenly spaced, are ordered by suspicion; None for all. The
            gold standard is made for these.
        order_by: ``self`` takes the instances that their own loss depends on most (self-influence), which
            needs no right labels to compare with; ``test`` those that harm the test instances most, which is
            another question: a wrong label may harm none of them, and rare right ones do.
        repeats: final models, each trained on other flips; error bars are over them.
        seeds: of further training; None for as many as the gold standard has; 0 leaves out its row.
        seed: of the flips.
    """

    def __init__(
        self,
        share: float = 0.1,
        candidates: int | None = 100,
        order_by: str = "self",
        repeats: int = 3,
        seeds: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < share < 1:
            raise InputError(f"{KEY}.share", f"expected a share between 0 and 1 but got {share}")
        if order_by not in ("test", "self"):
            raise InputError(f"{KEY}.order_by", f"expected test or self but got {order_by!r}")
        if repeats < 1:
            raise InputError(f"{KEY}.repeats", f"expected at least 1 but got {repeats}")
        if candidates is not None and candidates < 2:
            raise InputError(f"{KEY}.candidates", f"expected at least 2 but got {candidates}")
        self.share, self.candidates, self.order_by = share, candidates, order_by
        self.repeats, self.seeds, self.seed = repeats, seeds, seed

    def check(self, run: Judged) -> None:
        if run.data.task != "classification":
            raise InputError(KEY, f"labels can only be flipped in classification; this is {run.data.task}")
        if not run.trained_here:
            raise InputError(
                KEY,
                "flips labels before the final model is trained, so it must be trained here, without "
                "model.checkpoint; mode=audit lists the suspects of a given one",
            )
        if self.order_by == "test":
            better(run)

    def __call__(self, run: Judged) -> pd.DataFrame:
        candidates = self._candidates(len(run.data.train))
        repeats = []
        for repeat in range(self.repeats):
            generator = torch.Generator().manual_seed(1000 * self.seed + repeat)
            targets, flipped = flip_labels(run.data.train.targets, self.share, run.data.outputs, generator)
            flipped_run = run.with_targets(targets)
            found = {**self._found(flipped_run, candidates), **baselines(flipped_run, candidates)}
            repeats.append((found, flipped[candidates]))
        return detection(repeats)

    def _candidates(self, instances: int) -> list[int]:
        count = min(self.candidates or instances, instances)
        return [k * instances // count for k in range(count)]

    def _found(self, run: Judged, candidates: Sequence[int]) -> dict[str, Tensor]:
        """Return by method the suspicion ``[L]`` of each candidate."""
        measure: Callable[[Tensor], Tensor] = own
        if self.order_by == "self":
            run = run.measuring_loss().explaining(run.data.train[list(candidates)])
        else:
            sign = better(run)

            def measure(scores: Tensor) -> Tensor:
                return sign * suspicion(scores)

        found = {name: measure(scores.values) for name, scores in run.scores(candidates).items()}
        if self.seeds != 0:
            seeds = seeds_of(self.seeds, run, f"{KEY}.seeds")
            found[GOLD_STANDARD] = measure(run.leave_out(list(candidates), seeds).raw.mean(0))
        return found


def own(scores: Tensor) -> Tensor:
    """Return self-influences: the diagonal of ``[L, L]``, or of the last of ``[E, L, L]``; ``[L]``."""
    return (scores[-1] if scores.ndim == 3 else scores).double().diagonal()


def baselines(run: Judged, candidates: Sequence[int]) -> dict[str, Tensor]:
    """Return by name the suspicion ``[L]`` of each candidate without any attribution."""
    model, train = run.final_model, run.data.train
    found = {OWN_LOSS: model.losses(train[list(candidates)]).double()}
    if run.why_not_from_scratch() is None:
        found[CLEANLAB] = held_out_losses(run, candidates)
    if inapplicable(model, train) is None:
        found[SUSPECTS] = suspects(model, train, run.protocol).score[list(candidates)]
    return found


def held_out_losses(run: Judged, candidates: Sequence[int]) -> Tensor:
    """Return each candidate's loss ``[L]`` by a model that was trained from scratch without its fold."""
    order = torch.randperm(len(run.data.train), generator=torch.Generator().manual_seed(0))
    folds = [sorted(order[k::FOLDS].tolist()) for k in range(FOLDS)]
    fold = torch.empty(len(order), dtype=torch.int64)
    for k, members in enumerate(folds):
        fold[members] = k
    found = run.measuring_loss().explaining(run.data.train[list(candidates)]).retrain(folds, [0])
    assert found.full_losses is not None
    without = found.full_losses[0, -1, :, None] + found.raw[0, -1].double()
    return without.gather(1, fold[list(candidates)][:, None])[:, 0]
