"""Fact tracing: do a method's most helpful training instances state the fact that a test instance asks for?

After Akyürek et al. (2022), who trace what a language model knows to the sentences that state it, and find
that a search for its words does it better than attribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor

from fimo.data.instances import IGNORED, Instances
from fimo.data.language import LanguageData
from fimo.errors import InputError
from fimo.evaluation.metrics import mean_and_sem
from fimo.models.final_model import FinalModel
from fimo.reporting.task_curves import Curve
from fimo.tasks.base import Judged, Task, better, seeds_of

KEY = "evaluation.tasks.fact_tracing"
GOLD_STANDARD = "further training"
"""The row of the sensitivity itself."""

WORD_OVERLAP = "word overlap (BM25)"
"""The row of a search for the words of prompt and completion."""


class FactTracing(Task):
    """Recall and reciprocal rank of the training instances that state the fact of a test instance.

    Args:
        counts: numbers k of the most helpful training instances among which they are looked for.
        known: judge by those test instances only whose tokens the final model all finds the most likely:
            what it does not know can't be traced.
        seeds: of further training without each of *all* training instances, for the gold standard's row; 0
            leaves it out, None takes all of the run's.
        seed: of the order of instances with equal scores.
    """

    curve = Curve(
        "k",
        "most helpful training instances looked at",
        "recall",
        "Fact tracing: share of the training instances that state a test instance's fact which are among the "
        "most helpful ones.",
    )

    def __init__(
        self, counts: Sequence[int] = (1, 3, 10, 30), known: bool = True, seeds: int | None = 0, seed: int = 0
    ) -> None:
        if not counts or min(counts) < 1:
            raise InputError(f"{KEY}.counts", f"expected numbers of at least 1 but got {list(counts)}")
        self.counts, self.known, self.seeds, self.seed = sorted(set(counts)), known, seeds, seed

    def check(self, run: Judged) -> None:
        statements(run)
        better(run)
        if self.counts[-1] > len(run.data.train):
            raise InputError(
                f"{KEY}.counts", f"expected at most all {len(run.data.train)} but got {self.counts[-1]}"
            )
        if self.seeds != 0:
            seeds_of(self.seeds, run, f"{KEY}.seeds")

    def __call__(self, run: Judged) -> pd.DataFrame:
        data, stated = statements(run)
        scores = run.scores()
        tests = next(iter(scores.values())).test
        assert tests is not None
        sign = better(run)
        found = {name: sign * last(each.values) for name, each in scores.items()}
        found[WORD_OVERLAP] = word_overlap(data.texts("test"), data.texts("train"))[tests]
        if self.seeds != 0:
            seeds = seeds_of(self.seeds, run, f"{KEY}.seeds")
            truth = run.leave_out(list(range(len(data.train))), seeds)
            found[GOLD_STANDARD] = sign * last(truth.raw.double().mean(0))
        judged = stated[tests].any(1)
        if self.known:
            judged &= completed(run.final_model, data.test[tests])
        if not judged.any():
            raise InputError(KEY, "the final model knows no fact that is asked for; train it for longer")
        return traced({n: s[judged] for n, s in found.items()}, stated[tests][judged], self.counts, self.seed)


def statements(run: Judged) -> tuple[LanguageData, Tensor]:
    """Return a run's data, and which training instances state what test instances ask for, ``[J, N]`` bool.

    Raises:
        InputError: nothing says which do, or none does.
    """
    data = run.data
    if not isinstance(data, LanguageData):
        raise InputError(
            KEY, f"needs a language model's data, dataset=facts or language; this is {data.name}"
        )
    facts = [data.facts(split) for split in ("train", "test")]
    for part, source in zip(facts, ("dataset.path", "the test instances' table"), strict=True):
        if part is None:
            wanted = "give one, and name it by dataset.fact" if data.columns.fact is None else "add it"
            raise InputError("dataset.fact", f"no column of {source} says which fact a row is of; {wanted}")
    train, test = (np.asarray(part, dtype=object) for part in facts)
    stated = torch.from_numpy((test[:, None] == train[None]) & (test[:, None] != ""))
    if not stated.any():
        raise InputError("dataset.fact", "no training instance states a fact that a test instance asks for")
    return data, stated


def last(scores: Tensor) -> Tensor:
    """Return scores ``[J, N]`` at the last amount of further training."""
    return (scores[-1] if scores.ndim == 3 else scores).double()


def completed(model: FinalModel, test: Instances) -> Tensor:
    """Return which test instances' tokens are all the most likely ones, ``[J]`` bool."""
    best = torch.cat([model.outputs(batch).argmax(-1) for batch in test.batches(64)])
    return ((best == test.targets) | (test.targets == IGNORED)).all(1)


def traced(
    scores: Mapping[str, Tensor], stated: Tensor, counts: Sequence[int], seed: int = 0
) -> pd.DataFrame:
    """Judge scores by what the instances state that they put first.

    Args:
        scores: by method, ``[J, N]``.
        stated: ``[J, N]`` bool, at least one of each row.
        counts: numbers k.
        seed: of the order of instances with equal scores.

    Returns:
        ``method,k,mean,sem,chance,reciprocal_rank,reciprocal_rank_sem,tests``: recall at k, its mean and
        standard error over test instances, and what a random order gives; the mean of 1 over the rank of the
        first that states the fact, with its standard error, the same for all k.
    """
    n = stated.shape[1]
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rows = []
    for method, values in scores.items():
        order = values[:, shuffled].argsort(dim=1, descending=True, stable=True)
        hits = stated[:, shuffled].gather(1, order)  # [J, N], by rank
        first, first_sem = mean_and_sem(1 / (hits.double().argmax(1) + 1))
        for k in counts:
            recall, sem = mean_and_sem(hits[:, :k].sum(1).double() / hits.sum(1))
            rows.append(
                (method, k, recall.item(), sem.item(), k / n, first.item(), first_sem.item(), len(hits))
            )
    columns = ["method", "k", "mean", "sem", "chance", "reciprocal_rank", "reciprocal_rank_sem", "tests"]
    return pd.DataFrame(rows, columns=columns)


def word_overlap(queries: Sequence[str], passages: Sequence[str], k1: float = 1.5, b: float = 0.75) -> Tensor:
    """Return BM25's scores ``[J, N]`` of passages for queries (Robertson and Zaragoza, 2009).

    score = sum over words w of the query of idf(w) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|)), where f
    is how often w is in the passage d, and idf(w) = log(1 + (N - n + 1/2) / (n + 1/2)) for n passages with w.
    """
    words = CountVectorizer(token_pattern=r"\w+")
    count = words.fit_transform(passages).toarray().astype(float)  # [N, W]
    asked = words.transform(queries).toarray().astype(float)  # [J, W]
    containing = (count > 0).sum(0)
    idf = np.log1p((len(count) - containing + 0.5) / (containing + 0.5))
    length = count.sum(1, keepdims=True)
    weight = idf * count * (k1 + 1) / (count + k1 * (1 - b + b * length / length.mean()))
    return torch.from_numpy(asked @ weight.T)
