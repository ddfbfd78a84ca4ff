"""The screen: scores of all training rows for a few targets, by derivatives of full runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fimo.audit.question import Question, Resources
from fimo.errors import InputError
from fimo.further_training.stacked_adjoint import adjoints
from fimo.further_training.trajectory import FurtherTraining
from fimo.linear_response.gradient_flow import MeanBatchResponse
from fimo.store.files import read_tensors, write_tensors
from fimo.store.fingerprint import Key, adjoint_key, kept

log = logging.getLogger(__name__)

TRIMMED = 0.2
"""Share of seeds on each side that scores leave aside."""


@dataclass(frozen=True)
class Screened:
    """Predicted effects of all N rows on M targets, at the end of further training.

    Args:
        score: ``[M, N]`` float64.
        spread: ``[M, N]``, standard error by the seeds followed alone.
        self_effect: ``[N]``, predicted effect on the row's own loss.
        followed: the seeds.
        method: in words.
    """

    score: Tensor
    spread: Tensor
    self_effect: Tensor
    followed: tuple[int, ...]
    method: str


def screen(question: Question, seeds: Sequence[int], resources: Resources) -> Screened:
    """Predict the effect of leaving out each row, from the full runs of some seeds.

    score[m, i] = - trimmed mean over seeds of d loss_m / d w_i, by the adjoint of the seed's full run
    (:func:`~fimo.further_training.adjoint.adjoint`): to first order in the weight w_i that leaving i out
    takes from 1 to 0, and exact in batches, optimizer and curvature. A target is a weighted mean of
    test losses, and so costs about three runs for each seed, whatever N and J are. A row of one of a run's
    last batches has a hundred times its usual effect there: of many rows, the largest means over ten seeds
    would be those of such chances, and other seeds show nothing of them (:func:`trimmed`).

    Args:
        seeds: S, others than those of the real runs that are to be predicted.

    Raises:
        InputError: the full runs diverge.
    """
    found = adjoint_scores(question, seeds, resources)
    if not torch.isfinite(found).any():
        raise InputError("further_training.lr", "the full runs diverge: no score is finite; lower it?")
    return Screened(
        *trimmed(found), self_effects(question, resources), tuple(seeds),
        f"adjoint of {len(seeds)} full runs",
    )  # fmt: skip


def trimmed(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return means over seeds without the lowest and the highest fifth, and their standard errors.

    The error is that of Tukey and McLaughlin (1963): the standard deviation of values of which the omitted
    ones are drawn to the nearest kept one, over (1 - 2 g / S) sqrt(S), g being omitted on each side. With
    fewer than five seeds nothing is omitted.

    Args:
        values: ``[S, ...]``.
    """
    count = len(values)
    omitted = int(TRIMMED * count)
    ordered = values.sort(0).values
    kept = ordered[omitted : count - omitted]
    drawn = values.clamp(kept[0], kept[-1])
    return kept.mean(0), drawn.std(0) / ((1 - 2 * omitted / count) * count**0.5)


def adjoint_scores(question: Question, seeds: Sequence[int], resources: Resources) -> Tensor:
    """Return each seed's scores ``[S, M, N]`` float64, from the store where it has them.

    Each is written there as soon as it is known, so that what is interrupted goes on where it stopped.
    """
    model, measured = question.measured

    def key(seed: int) -> Key:
        return adjoint_key(
            resources.described(model, question.train), measured, question.weight, question.protocol,
            question.steps, seed,
        )  # fmt: skip

    with ExitStack() as stack:
        paths = {
            seed: stack.enter_context(kept(resources.store, "adjoint", partial(key, seed))) / "adjoint"
            for seed in seeds
        }
        if missing := [seed for seed in seeds if not paths[seed].exists()]:

            def keep(seed: int, derivative: Tensor) -> None:
                write_tensors(paths[seed], {"derivative": derivative})

            adjoints(
                model, question.train, measured, question.protocol, missing, question.weight,
                device=resources.device, done=keep,
            )  # fmt: skip
        return -torch.stack([read_tensors(paths[seed])["derivative"] for seed in seeds]).double()


def self_effects(question: Question, resources: Resources) -> Tensor:
    """Predict the change of each row's own loss when it is left out, ``[N]`` float64.

    By the response in EK-FAC's eigenbasis: N adjoints would take N times as long as one target's.
    """
    train = question.train.to(resources.device)
    response = MeanBatchResponse(
        question.final_model.to(resources.device), train,
        FurtherTraining(question.protocol, (question.steps,), (), lambda: iter(())),
        1, "outputs", 1024, question.rule.multiplicity(torch.arange(len(train))),
    )  # fmt: skip
    return response.of_themselves().cpu()
