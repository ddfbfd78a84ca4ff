"""Training from scratch leaving instances out: the gold standard of access to the training algorithm."""

from __future__ import annotations

from fimo.errors import InputError
from fimo.further_training.sensitivity import Sensitivity
from fimo.tasks.base import Judged, Task, seeds_of

KEY = "evaluation.tasks.retraining"


class Retraining(Task):
    """The sensitivity of training from scratch, on the same left-out and test instances.

    Args:
        seeds: trainings of each; a seed fixes the initial parameters and the data order, in the full training
            and in those leaving an instance out. None for as many as the gold standard has.
    """

    def __init__(self, seeds: int | None = None) -> None:
        self.seeds = seeds

    def check(self, run: Judged) -> None:
        check_retraining(run, KEY)

    def __call__(self, run: Judged) -> Sensitivity:
        return run.retrain(run.left_out, seeds_of(self.seeds, run, f"{KEY}.seeds"))


def check_retraining(run: Judged, key: str) -> None:
    """Refuse what the engine can't train from scratch.

    Raises:
        InputError: with ``key``: batch statistics that would have to be learned, or no epochs.
    """
    if reason := run.why_not_from_scratch():
        raise InputError(key, reason)
