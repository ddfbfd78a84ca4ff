"""Training rows whose labels, or targets, are probably wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fimo.audit.false_discovery import error_probability, list_rates
from fimo.audit.out_of_sample import OutOfSample, out_of_sample
from fimo.data.instances import IGNORED, Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.models.final_model import FinalModel
from fimo.models.frozen import trained_part
from fimo.validation.admission import admit

FEWEST_ROWS = 40
"""Rows without which neither a predictor nor the share of errors can be learnt."""

FEWEST_OF_A_CLASS = 5
"""Of a class with fewer rows, held-out predictions know nothing: its rows are not judged, nor those without
a label."""

OTHER_TARGETS = 20
"""Targets of other rows that each row is tried with."""


@dataclass(frozen=True)
class Suspects:
    """Which of N training rows have wrong labels or targets, by what is expected of them out of sample.

    Args:
        score: ``[N]``, how suspicious: for classes the log-odds against the row's own label, for values the
            distance from what is expected in deviations of such rows. The order by it is the result.
        probability: ``[N]``, that the row is wrong.
        q: ``[N]``, the false discovery rate of the list of suspects from the top down to the row.
        expected: ``[N, C]`` probabilities of classes, or ``[N, D]`` values, out of sample.
        suggested: ``[N]`` int64, the most probable class, or ``[N, D]`` values as expected.
        share: the share of wrong rows, as estimated.
        forest: the weight of the random forest beside the network.
    """

    score: Tensor
    probability: Tensor
    q: Tensor
    expected: Tensor
    suggested: Tensor
    share: float
    forest: float

    @property
    def order(self) -> str:
        """By what rows are ordered, in words."""
        of_values = self.suggested.is_floating_point()
        what = "a target's distance from what is expected" if of_values else "the log-odds against its label"
        who = ["networks"] * (self.forest < 1) + ["a random forest"] * (self.forest > 0)
        return f"{what}, by {' and '.join(who)} that did not see the row"

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it as tensors by name; see :meth:`of_tensors`."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            n: v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for n, v in whole.items()
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Suspects:
        """Return what :meth:`tensors` are of."""
        numbers = {name: float(tensors[name]) for name in ("share", "forest")}
        return cls(**{**tensors, **numbers})  # type: ignore[arg-type]

    def within(self, rate: float = 0.1) -> Tensor:
        """Return the indices of the longest list with at most this false discovery rate, the first first."""
        if not 0 < rate < 1:
            raise InputError("q", f"expected a rate between 0 and 1 but got {rate}")
        found = (self.q <= rate).nonzero()[:, 0]
        return found[self.score[found].argsort(descending=True, stable=True)]


def suspects(
    model: FinalModel,
    train: Instances,
    further_training: Protocol | None = None,
    *,
    certain: bool = False,
    folds: int = 5,
    repeats: int = 4,
    seed: int = 0,
    once: Callable[[Callable[[], OutOfSample]], OutOfSample] = lambda make: make(),
) -> Suspects:
    """Find training rows whose labels (classification) or targets (regression) are probably wrong.

    The final model remembers what it was trained on, so it is not asked. Networks of its architecture that
    have not seen a row, and a random forest, say what is expected of it
    (:mod:`fimo.audit.out_of_sample`); errors that are planted on paper say how suspicious a wrong row is, and
    so how many of the suspicious rows are wrong (:mod:`fimo.audit.false_discovery`). Wrong is what is taken
    to be as likely in each class: a label that is wrong by a rule of its own is found, but its rate is not
    promised.

    Args:
        model: the final model, trained here or read from a checkpoint.
        train: all N training instances.
        further_training: needed where the network can't be initialised anew.
        certain: whoever knows a row's inputs knows its label, as of digits that a person can read: the list
            at a rate is longer then. By default some rows may be ambiguous, which look like errors.
        folds, repeats: of cross-validation.
        seed: of folds, initial parameters and trees.
        once: returns what the function that it is given makes: networks and forest that did not see the rows,
            nearly all of the time that this takes; or what that made before, of the same arguments but for
            ``certain``.

    Raises:
        InputError: too few rows, sequences of tokens, folds or repeats out of range.
    """
    train, _ = admit(model, train)
    if (why := inapplicable(model, train)) is not None:
        raise InputError("dataset", why)
    for key, value, least, most in (("folds", folds, 2, len(train) // 2), ("repeats", repeats, 1, 100)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InputError(key, f"expected a whole number from {least} to {most} but got {value!r}")
    labels = _labels(model, train)
    named = torch.ones(len(train), dtype=torch.bool) if labels is None else labels >= 0
    trained, (seen,) = trained_part(model, train)
    seen = seen[named.nonzero()[:, 0].to(seen.targets.device)]
    labels = None if labels is None else labels[named]
    found = once(lambda: out_of_sample(trained, seen, labels, further_training, folds, repeats, seed))
    if labels is None:
        score, planted = _of_values(found, seen.targets.detach().double().cpu().flatten(1), seed)
        judged = torch.ones(len(score), dtype=torch.bool)
    else:
        score, planted, judged = _of_classes(found.expected, labels)
    observed = score[judged].numpy()
    chance, share = error_probability(observed, planted, certain)
    probability, q = torch.zeros_like(score), torch.ones_like(score)
    probability[judged], q[judged] = torch.from_numpy(chance), torch.from_numpy(list_rates(chance, observed))
    suggested = found.expected if labels is None else found.expected.argmax(1)

    def of_all(part: Tensor, otherwise: float) -> Tensor:
        whole = torch.full((len(train), *part.shape[1:]), otherwise, dtype=part.dtype)
        whole[named] = part
        return whole

    return Suspects(
        of_all(score, float(score.min())), of_all(probability, 0.0), of_all(q, 1.0),
        of_all(found.expected, torch.nan), of_all(suggested, IGNORED), share, found.forest,
    )  # fmt: skip


def inapplicable(model: FinalModel, train: Instances) -> str | None:
    """Return why no suspects can be looked for among training rows, or None."""
    targets = train.targets
    if len(train) < FEWEST_ROWS:
        return f"expected at least {FEWEST_ROWS} training rows but got {len(train)}"
    if not targets.is_floating_point() and targets.ndim > 1:
        return "targets are sequences of tokens: suspects are of labels and values"
    labels = _labels(model, train)
    if labels is None and model.loss.targets == "probabilities":
        return "targets are probabilities: suspects are of labels and values"
    if labels is not None and int((torch.bincount(labels[labels >= 0]) >= FEWEST_OF_A_CLASS).sum()) < 2:
        return f"expected two classes of at least {FEWEST_OF_A_CLASS} training rows"
    return None


def _labels(model: FinalModel, train: Instances) -> Tensor | None:
    """Return the rows' classes ``[N]`` int64, also where they are given as probabilities 0 and 1."""
    targets = train.targets.detach().cpu()
    if not targets.is_floating_point():
        return targets
    single = model.loss.targets == "probabilities" and targets.numel() == len(targets)
    if single and bool(((targets == 0) | (targets == 1)).all()):
        return targets.flatten().long()
    return None


def _of_classes(expected: Tensor, targets: Tensor) -> tuple[Tensor, np.ndarray, Tensor]:
    """Return log-odds against each row's label ``[N]``, against other labels ``[M]``, and who is judged."""
    against = -expected.clamp(1e-12, 1 - 1e-12).logit()
    own = torch.zeros_like(expected, dtype=torch.bool).scatter_(1, targets[:, None], True)
    common = torch.bincount(targets, minlength=expected.shape[1]) >= FEWEST_OF_A_CLASS
    score, judged = against[own], common[targets]
    others = ~own & common & judged[:, None]
    return torch.where(judged, score, score.min()), against[others].numpy(), judged


def _of_values(found: OutOfSample, targets: Tensor, seed: int) -> tuple[Tensor, np.ndarray]:
    """Return distances from what is expected ``[N]``, and those with other rows' targets ``[M]``."""
    expected, deviation = found.expected, found.deviation
    assert deviation is not None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(targets), (OTHER_TARGETS, len(targets)), generator=generator)

    def distance(values: Tensor) -> Tensor:
        return ((values - expected) / deviation).square().mean(-1).sqrt()

    return distance(targets), distance(targets[drawn]).flatten().numpy()
