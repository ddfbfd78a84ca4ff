"""Predictions of training rows by what has not seen them: networks and a random forest, together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from torch import Tensor

from fimo.audit.held_out_runs import held_out_outputs, why_not_fresh
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.models.final_model import FinalModel

TREES = 200
"""Of as many rows as there are; see :func:`_trees`."""

LEAF = 3
"""Fewest rows of a leaf of the forest that predicts targets."""

ROWS_OF_A_TREE = 20_000
"""Most rows that a tree is grown on: more cost time and add little."""

AT_A_TIME = 8
"""Trees that are held at a time: one of 20,000 rows in ten classes takes more than a megabyte."""

BLOCK = 8192
"""Rows that a tree predicts at a time."""

MOST_FEATURES = 4096
LEAST_PROBABILITY = 1e-3
"""Mixed evenly into a forest's shares of votes, which may be 0."""


@dataclass(frozen=True)
class OutOfSample:
    """What is expected of each row without having seen it.

    Args:
        expected: ``[N, C]`` probabilities of classes, or ``[N, D]`` values, float64.
        deviation: ``[N, D]``, how far targets of such rows are from what is expected; None for classes.
        forest: the forest's weight beside the network; 0 where there is none.
    """

    expected: Tensor
    deviation: Tensor | None
    forest: float

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it as tensors by name; see :meth:`of_tensors`."""
        found = {"expected": self.expected, "forest": torch.tensor(self.forest, dtype=torch.float64)}
        return found if self.deviation is None else {**found, "deviation": self.deviation}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> OutOfSample:
        """Return what :meth:`tensors` are of."""
        return cls(tensors["expected"], tensors.get("deviation"), float(tensors["forest"]))


def out_of_sample(
    model: FinalModel,
    train: Instances,
    labels: Tensor | None,
    further_training: Protocol | None = None,
    folds: int = 5,
    repeats: int = 4,
    seed: int = 0,
) -> OutOfSample:
    """Predict each row without it: the mean of repeated cross-validation, and of a forest's trees.

    The two are mixed with the weight under which the rows' own labels are most likely (for values, the one
    of the smallest squared error): stacking (Wolpert, 1992). Where the network could not be initialised anew
    their weights are equal, since it has seen the labels that it would be weighed by. The forest sees what
    enters the trained part of the network, where that is a vector of numbers.

    Args:
        labels: ``[N]`` int64; None where targets are values.
        further_training, folds, repeats, seed: see :func:`~fimo.audit.held_out_runs.held_out_outputs`.
    """
    outputs = held_out_outputs(model, train, further_training, folds, repeats, seed).double().cpu()
    features, fair = _features(train), why_not_fresh(model) is None
    if labels is not None:
        network, weight = _probabilities(outputs.flatten(2)).mean(0), 0.0
        if features is not None:
            forest = _class_shares(features, labels, network.shape[1], seed)
            weight = _best_weight(lambda w: _surprise(_mixed(network, forest, w), labels)) if fair else 0.5
            network = _mixed(network, forest, weight)
        return OutOfSample(network, None, weight)
    values = train.targets.detach().double().cpu().flatten(1)
    network = outputs.mean(0).flatten(1)
    if features is None:
        return OutOfSample(network, _common_deviation(values - network), 0.0)
    forest = _forest_values(features, values, LEAF, seed)
    weight = 0.5
    if fair:
        weight = _best_weight(lambda w: float((_mixed(network, forest, w) - values).square().mean()))
    expected = _mixed(network, forest, weight)
    return OutOfSample(expected, _deviation(features, values - expected, seed), weight)


def _probabilities(outputs: Tensor) -> Tensor:
    """Return class probabilities ``[..., C]`` of logits, also of the one logit of two classes."""
    if outputs.shape[-1] > 1:
        return outputs.softmax(-1)
    second = outputs.sigmoid()
    return torch.cat([1 - second, second], -1)


def _features(train: Instances) -> np.ndarray | None:
    """Return the inputs ``[N, width]`` that a forest can take, or None."""
    inputs = train.inputs
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return None
    rows = inputs.detach().flatten(1).cpu()
    return rows.float().numpy() if rows.shape[1] <= MOST_FEATURES else None


def _trees(rows: int) -> int:
    """Return how many trees are grown, so that each row has the votes of as many that did not see it.

    A tree has not seen a row with probability (1 - 1 / N)^M, of N rows and M that it is grown on: 1 / e where
    M is N, and nearly 1 of many more rows, of which fewer trees are needed.
    """
    unseen = (1 - 1 / rows) ** min(rows, ROWS_OF_A_TREE)
    return max(1, round(TREES * (1 - 1 / rows) ** rows / unseen))


def _unseen_by_trees(
    forest: type[RandomForestClassifier] | type[RandomForestRegressor],
    features: np.ndarray,
    targets: np.ndarray,
    width: int,
    seed: int,
    **settings: object,
) -> np.ndarray:
    """Return the mean prediction ``[N, width]`` of those trees that were grown without the row; 0 of none.

    What scikit-learn calls out of bag, of a forest whose trees are never held all at once.
    """
    n, count = len(features), _trees(len(features))
    drawn = np.random.RandomState(seed)  # draws the same trees in parts as at once
    total, votes = np.zeros((n, width)), np.zeros(n)
    for start in range(0, count, AT_A_TIME):
        part = forest(
            n_estimators=min(AT_A_TIME, count - start), max_samples=min(n, ROWS_OF_A_TREE),
            random_state=drawn, n_jobs=torch.get_num_threads(), **settings,
        ).fit(features, targets)  # fmt: skip
        predicts = "predict_proba" if forest is RandomForestClassifier else "predict"
        for tree, seen in zip(part.estimators_, part.estimators_samples_, strict=True):
            unseen = np.ones(n, dtype=bool)
            unseen[seen] = False
            votes += unseen
            rows = np.flatnonzero(unseen)
            for some in np.split(rows, range(BLOCK, len(rows), BLOCK)):
                found = getattr(tree, predicts)(features[some], check_input=False)
                total[some] += found.reshape(len(some), width)
    return np.asarray(total / np.maximum(votes, 1)[:, None])


def _class_shares(features: np.ndarray, targets: Tensor, classes: int, seed: int) -> Tensor:
    """Return class probabilities ``[N, C]`` by those trees that were grown without the row."""
    there = np.unique(targets.numpy())
    shares = np.full((len(features), classes), LEAST_PROBABILITY)
    shares[:, there] += _unseen_by_trees(
        RandomForestClassifier, features, targets.numpy(), len(there), seed, min_samples_leaf=LEAF
    )
    return torch.from_numpy(shares / shares.sum(1, keepdims=True))


def _forest_values(features: np.ndarray, values: Tensor, leaf: int, seed: int) -> Tensor:
    """Return values ``[N, D]`` by those trees that were grown without the row."""
    found = _unseen_by_trees(
        RandomForestRegressor, features, values.squeeze(1).numpy(), values[0].numel(), seed,
        min_samples_leaf=leaf, max_features=1 / 3,
    )  # fmt: skip
    return torch.from_numpy(found).view(values.shape)


def _mixed(network: Tensor, forest: Tensor, weight: float) -> Tensor:
    return weight * forest + (1 - weight) * network


def _best_weight(loss: Callable[[float], float]) -> float:
    """Return the forest's weight, in tenths, of the smallest loss."""
    return min((k / 10 for k in range(11)), key=loss)


def _surprise(probabilities: Tensor, labels: Tensor) -> float:
    return -float(probabilities.gather(1, labels[:, None]).clamp(min=1e-12).log().mean())


def _common_deviation(residual: Tensor) -> Tensor:
    """Return one robust standard deviation for all rows, ``[N, D]``: 1.48 median absolute residuals."""
    scale = 1.4826 * residual.abs().median(0).values
    return scale.clamp(min=1e-12).expand_as(residual)


def _deviation(features: np.ndarray, residual: Tensor, seed: int) -> Tensor:
    """Return how far targets of rows like each one are from what is expected, ``[N, D]``.

    By a forest of absolute residuals, each bounded by four robust deviations, so that an error does not hide
    itself, with at least half of the deviation that all have in common.
    """
    common = _common_deviation(residual)
    bounded = residual.abs().minimum(4 * common)
    local = 1.2533 * _forest_values(features, bounded, 20, seed)  # of a normal: sd = sqrt(pi/2) mean |r|
    return local.maximum(common / 2)
