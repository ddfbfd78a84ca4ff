"""Whether the loss is one value for each instance, which depends on that instance alone."""

from __future__ import annotations

from typing import Any

import torch

from fimo.checking.verdict import Line, fails, passes, warns
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.models.final_model import FinalModel, apply
from fimo.validation.admission import PROBE, admit, as_instances, tried
from fimo.validation.probabilities import unlike_logits

NAME = "loss"


def losses(final_model: FinalModel, train: Any, test: Any) -> tuple[Line, Instances, Instances]:
    """Hand model and instances in through validation, as everything else does.

    Returns:
        The line, and the training and test instances as the loss takes them (where it passes).
    """
    train, test = as_instances(train, "dataset.train"), as_instances(test, "dataset.test")
    try:
        found, tested = admit(final_model, train, test)
    except InputError as error:
        return fails(NAME, _repeated(final_model, train) or str(error)), train, test
    text = "one value for each instance, which depends on it alone, in evaluation and in training steps"
    if not torch.isfinite(final_model.losses(tested[: min(PROBE, len(tested))])).all():
        return fails(NAME, "losses are not finite"), found, tested
    outputs = tried(final_model, found[: min(PROBE, len(found))])
    if (said := unlike_logits(final_model.loss, outputs)) is not None:
        return warns(NAME, said), found, tested
    return passes(NAME, f"{text} ({min(PROBE, len(train))} instances)"), found, tested


@torch.no_grad()
def _repeated(final_model: FinalModel, train: Instances) -> str | None:
    """Return what explains any other difference: outputs that differ when they are computed again."""
    try:
        once, again = (apply(final_model.network, train[:2].inputs) for _ in range(2))
    except Exception:  # which validation has said already
        return None
    if torch.equal(once, again):
        return None
    return (
        "model.network: the same instances have other outputs when they are evaluated again: does forward "
        "draw random numbers that no seed controls?"
    )
