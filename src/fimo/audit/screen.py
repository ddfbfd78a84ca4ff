"""The screen: scores of all training rows for a few targets, by derivatives of full runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.audit.question import Question, Resources
from fimo.engine.threads import side_by_side
from fimo.further_training.adjoint import adjoint
from fimo.further_training.trajectory import FurtherTraining
from fimo.linear_response.gradient_flow import MeanBatchResponse
from fimo.store.files import read_tensors, write_tensors
from fimo.store.fingerprint import adjoint_key, kept

log = logging.getLogger(__name__)


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

    score[m, i] = - mean over seeds of d loss_m / d w_i, by the adjoint of the seed's full run
    (:func:`~fimo.further_training.adjoint.adjoint`): to first order in the weight w_i that leaving i out
    takes from 1 to 0, and exact in batches, optimizer and curvature. A target is a weighted mean of
    test losses, and so costs about three runs for each seed, whatever N and J are.

    Args:
        seeds: S, others than those of the real runs that are to be predicted.
    """
    workers = torch.get_num_threads() if resources.device.type == "cpu" else 1

    def of_seed(seed: int) -> Tensor:
        return adjoint_scores(question, seed, resources)

    spread = torch.stack(side_by_side(of_seed, list(seeds), workers)).double()
    sem = spread.std(0) / len(spread) ** 0.5
    return Screened(
        spread.mean(0), sem, self_effects(question, resources), tuple(seeds),
        f"adjoint of {len(seeds)} full runs",
    )  # fmt: skip


def adjoint_scores(question: Question, seed: int, resources: Resources) -> Tensor:
    """Return a seed's scores ``[M, N]``, from the store where it has them."""
    model, measured = question.measured

    def key() -> object:
        return adjoint_key(
            resources.described(model, question.train), measured, question.weight, question.protocol,
            question.steps, seed,
        )  # fmt: skip

    with kept(resources.store, "adjoint", key) as folder:  # type: ignore[arg-type]
        path = folder / "derivative.safetensors"
        if path.exists():
            derivative = read_tensors(path)["derivative"]
        else:
            derivative = adjoint(
                model, question.train, measured, question.at_end, seed,
                weight=question.weight, device=resources.device,
            )[0].cpu()  # fmt: skip
            write_tensors(path, {"derivative": derivative})
    return -derivative


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
