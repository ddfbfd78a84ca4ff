"""Shapley values of a nearest-neighbour model."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.embedding import no_representation, representations
from fimo.models.final_model import FinalModel
from fimo.models.quantities import Quantities

MEMORY = 2**24
"""Numbers of one block of test instances."""


class KnnShapley(AttributionMethod):
    """Shapley value of a training instance for the prediction by k nearest neighbours (Jia et al., 2019).

    Neighbours are those of the hidden representations h that the network's last linear layer sees, so that
    the network itself is taken as fixed. With S a subset of the training set and K(S) its at most K instances
    nearest to h_j, the utility of S for test instance j is

        classes     U_j(S) = (1/K) sum over i in K(S) of [y_i = y_j], the probability of the right class,
        values      U_j(S) = -|(1/K) sum over i in K(S) of (y_i - m) - (y_j - m)|^2,

    m the mean of the training targets, which stands in for neighbours that S lacks. score[j, i] is the
    mean of U_j(S + i) - U_j(S) over the orders in which the training set can arrive, S what came before i: by
    the paper's closed forms, for all N in the time of sorting them. Of probabilities (several labels of an
    instance) [y_i = y_j] becomes 1 - the mean of |y_i - y_j|.

    Equal distances are sorted by the target, so that the order of the training set changes nothing.

    Args:
        neighbours: K.
        layer: name of the module whose input is the representation; the last linear layer when None.
        batch_size: instances per forward pass.
    """

    needs = "a last linear layer, and a class, label or value of each instance"
    cost = "one pass, and a sort of the training set for each test instance"
    use = "a baseline: near rows with a like or another target, no training followed"

    def __init__(self, neighbours: int = 5, layer: str | None = None, batch_size: int = 1024) -> None:
        if neighbours < 1:
            raise InputError("neighbours", f"expected at least 1 but got {neighbours}")
        self.neighbours, self.layer, self.batch_size = neighbours, layer, batch_size

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        if isinstance(final_model.measurement, Quantities):
            return "it explains how well the target is predicted, and no other quantity"
        if _kind(final_model, train) == "classes" and train.targets.ndim != 1:
            return "instances have many targets each, of which neighbours would have to agree in one"
        return no_representation(final_model, self.layer)

    def scores(self, problem: AttributionProblem) -> Tensor:
        model, train, test = problem.final_model, problem.train, problem.test
        if reason := self.inapplicable(model, train):
            raise InputError("methods.knn_shapley", reason)
        theirs = representations(model, train, self.layer, self.batch_size).double()
        ours = representations(model, test, self.layer, self.batch_size).double()
        kind, index = _kind(model, train), problem.index.to(ours.device)
        known, wanted = _columns(train.targets), _columns(test.targets)
        by_target = _sorted_rows(known)
        size, found = max(1, MEMORY // (len(train) * known.shape[1])), []
        for start in range(0, len(test), size):
            some, target = ours[start : start + size], wanted[start : start + size]
            # by differences: products would make equal rows differ by rounding
            apart = torch.cdist(some, theirs[by_target], compute_mode="donot_use_mm_for_euclid_dist")
            nearest = by_target[apart.argsort(dim=1, stable=True)]  # [J, N]
            if kind == "values":
                centre = known.double().mean(0)
                values = value_shapley(
                    known.double()[nearest] - centre, target.double() - centre, self.neighbours
                )
            else:
                values = class_shapley(_agreement(kind, known[nearest], target), self.neighbours)
            found.append(torch.empty_like(values).scatter_(1, nearest, values)[:, index])
        return torch.cat(found).to(problem.dtype)


def class_shapley(agreement: Tensor, neighbours: int) -> Tensor:
    """Return the Shapley values ``[J, N]`` of U(S) = (1/K) sum of the K nearest's agreements in S.

    Jia et al., theorem 1: s_N = v_N min(K, N) / (K N), s_i - s_{i+1} = (v_i - v_{i+1}) min(K, i) / (K i).

    Args:
        agreement: v ``[J, N]``, of the training instances from the nearest to the farthest.
        neighbours: K.
    """
    rank = torch.arange(1, agreement.shape[1] + 1, dtype=agreement.dtype, device=agreement.device)
    weight = rank.clamp(max=neighbours) / (neighbours * rank)
    steps = agreement.clone()
    steps[:, :-1] -= agreement[:, 1:]
    return _from_the_end(steps * weight)


def value_shapley(values: Tensor, wanted: Tensor, neighbours: int) -> Tensor:
    """Return the Shapley values ``[J, N]`` of U(S) = -|(1/K) sum of the K nearest's values in S - wanted|^2.

    The number of a random coalition's members among any n others is uniform on 0..n. So, with
    M_i = min(K, i), that at most K - 1 of i - 1 nearer instances are in it has probability M_i / i; that one
    of them is as well, a_i = M_i (M_i - 1) / (2 i (i - 1)); and that l > i + 1 is among the coalition's
    K - 1 nearest, a_{l-1}. Hence (Jia et al.'s unweighted regression)

        s_i - s_{i+1} = -(1/K) (y_i - y_{i+1}) . ((y_i + y_{i+1}) M_i / (K i) - 2 t M_i / i
                        + (2/K) (a_i sum over l < i of y_l + sum over l > i + 1 of a_{l-1} y_l))
        s_N = -(1/K) y_N . ((y_N / K - 2 t) M_N / N + (2/K) a_N sum over l < N of y_l).

    Args:
        values: y ``[J, N, D]``, of the training instances from the nearest to the farthest.
        wanted: t ``[J, D]``.
        neighbours: K.
    """
    n, k = values.shape[1], neighbours
    rank = torch.arange(1, n + 1, dtype=values.dtype, device=values.device)
    most = rank.clamp(max=k)
    share = (most / rank)[:, None]
    pair = (most * (most - 1) / (2 * rank * (rank - 1).clamp(min=1)))[:, None]  # a_i; a_1 = 0
    nearer = values.cumsum(1) - values
    farther = torch.zeros_like(values)  # sum over l > i + 1 of a_{l-1} y_l
    farther[:, :-2] = _from_the_end(pair[1:-1] * values[:, 2:])
    after = torch.zeros_like(values)
    after[:, :-1] = values[:, 1:]
    inside = (values + after) * share / k - 2 * wanted[:, None] * share + (2 / k) * (pair * nearer + farther)
    return _from_the_end(-((values - after) * inside).sum(2) / k)


def _from_the_end(steps: Tensor) -> Tensor:
    """Return the sums ``[J, N, ...]`` of all steps from each one to the last."""
    return steps.flip(1).cumsum(1).flip(1)


def _kind(final_model: FinalModel, train: Instances) -> str:
    """Return what targets are: classes, probabilities or values."""
    if final_model.loss.of_classes or not train.targets.is_floating_point():
        return "classes"
    return "probabilities" if final_model.loss.targets == "probabilities" else "values"


def _agreement(kind: str, known: Tensor, wanted: Tensor) -> Tensor:
    """Return how far targets ``[J, N, D]`` agree with ``[J, D]``, from 0 to 1."""
    if kind == "classes":
        return (known == wanted[:, None]).all(2).double()
    return 1 - (known.double() - wanted[:, None].double()).abs().mean(2)


def _sorted_rows(rows: Tensor) -> Tensor:
    """Return the order of rows ``[n, D]`` by their first column, then their second, and so on."""
    order = torch.arange(len(rows), device=rows.device)
    for column in reversed(range(rows.shape[1])):
        order = order[rows[order, column].argsort(stable=True)]
    return order


def _columns(targets: Tensor) -> Tensor:
    """Return targets as ``[n, D]``."""
    return targets[:, None] if targets.ndim == 1 else targets.flatten(1)
