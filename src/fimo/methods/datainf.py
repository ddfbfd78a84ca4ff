"""DataInf."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.arranged_rows import parts_of
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import DenseRows, FactoredRows, Rows, split
from fimo.curvature.module_rows import ModuleRows
from fimo.curvature.module_terms import Plain, Term
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.damping import Damping, DampingValue
from fimo.methods.gradient import GradientMethod
from fimo.models.final_model import FinalModel
from fimo.scores import Scores

LEAST = 1e-8
"""A layer's mean squared gradient counts as at least this share of the whole network's."""


class DataInf(GradientMethod):
    """Influence with the order of averaging and inverting exchanged, layer by layer (Kwon et al., 2024).

    The curvature of layer l is the empirical Fisher C_l = (1/N) sum_n g_n g_n^T, and (C_l + λ_l)^-1 is
    replaced by the mean of (g_n g_n^T + λ_l)^-1, which has a closed form:

        score[j, i] = (1/N) sum_l (1/λ_l) [ g_j·g_i - (1/N) sum_n (g_j·g_n)(g_n·g_i) / (λ_l + |g_n|^2) ].

    Only inner products of layer gradients are needed. A score is in units of loss change per removed
    instance, but the exchange overestimates the inverse (Jensen), so its size is not to be trusted.

    Args:
        damping: λ_l, by default 0.1 times the layer's own mean squared gradient, the authors' choice
            (``auto``); ``1x`` is one times it; a number is the same for all layers. A layer's mean squared
            gradient counts as at least 1e-8 of the whole network's: where it is zero but for rounding (the
            bias of attention's keys, which softmax cancels), 1/λ_l would make rounding errors as large as
            other layers' scores.
        layers: ``parameter``: each parameter tensor is a layer (as the authors' code has it); ``module``:
            weight and bias of a module together.
    """

    needs = "nothing else"
    cost = "one gradient per instance, layer by layer"
    use = "adapters and heads of large networks, as a cheap influence function"

    def __init__(
        self,
        damping: DampingValue = "auto",
        layers: Literal["parameter", "module"] = "parameter",
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(memory_mb, storage, cache)
        if layers not in ("parameter", "module"):
            raise InputError("layers", f"expected one of parameter, module but got {layers!r}")
        self.damping, self.grouping = Damping.parse(damping), layers

    @property
    def predicts_loss_change(self) -> bool:
        return True

    @property
    def follows_further_training(self) -> bool:
        return self.damping.kind == "time_matched"

    @property
    def follows_seeds(self) -> bool:
        """The damping depends on the amount of further training alone."""
        return False

    @property
    def without_further_training(self) -> str:
        return "; damping='auto' does without"

    def fit(self, final_model: FinalModel, train: Instances) -> LayerGradients:
        """Return what all test instances and dampings share."""
        gradients = self.gradients(final_model)
        groups: dict[str, list[str]] = {}
        for name in gradients.shapes:
            group = name if self.grouping == "parameter" else name.rpartition(".")[0]
            groups.setdefault(group, []).append(name)
        return LayerGradients(gradients, gradients.losses(train, "layers"), groups)

    def scores(self, problem: AttributionProblem) -> Scores:
        layers = self.fit(problem.final_model, problem.train)
        found = self.sweep(layers, [self.damping], problem)
        return self.result(
            problem,
            found if self.follows_further_training else found[0],
            gradient_evaluations=layers.gradients.evaluations,
        )

    def sweep(
        self, layers: LayerGradients, dampings: Sequence[Damping], problem: AttributionProblem
    ) -> Tensor:
        """Return the scores ``[E, J, L]`` for E dampings, which share all inner products."""
        gradients, rows = layers.gradients, layers.rows
        removed = rows if problem.left_out is None else gradients.losses(problem.removed, "layers")
        found = []
        # each test instance needs its solutions, and a weight of each training instance in each layer
        sizes = gradients.p * (1 + len(dampings)), rows.n * len(layers.groups) * (2 + len(dampings))
        megabytes = self.memory_mb * gradients.p / max(sizes)
        # products of all pairs of training instances are cheap where rows are factors, but there are many
        pairs = rows.n * removed.n * len(gradients.shapes) * rows.dtype.itemsize
        by_products = isinstance(rows, FactoredRows) and pairs <= self.memory_mb * 2**20 / 4
        for test in gradients.measurements(problem.test).pieces(megabytes):
            if by_products:
                found.append(self._by_products(layers, dampings, problem, test, removed))
            else:
                found.append(self._by_sums(layers, dampings, problem, test, removed))
        return torch.cat(found, 1) / len(problem.train)

    def _by_products(
        self,
        layers: LayerGradients,
        dampings: Sequence[Damping],
        problem: AttributionProblem,
        test: Rows,
        removed: Rows,
    ) -> Tensor:
        """Return ``[E, J, L]`` by inner products of all layers, which factored rows have for little."""
        norms, test_train = layers.norms_and_products(test)
        train_removed, test_removed = layers.rows.grams(removed), test.grams(removed)
        each = layers.dampings(norms, dampings, problem.further_training)
        count = len(each[next(iter(each))])  # a time-matched damping is one for each evaluation point
        total = torch.zeros(count, test.n, removed.n, dtype=removed.dtype, device=removed.device)
        for group, names in layers.groups.items():
            inner, direct = (
                sum_named(train_removed, names)[:, 0, :, 0],
                sum_named(test_removed, names)[:, 0, :, 0],
            )
            for e, damping in enumerate(each[group]):
                weighted = test_train[group] / (damping + norms[group])
                total[e] += (direct - weighted @ inner / layers.rows.n) / damping
        return total

    def _by_sums(
        self,
        layers: LayerGradients,
        dampings: Sequence[Damping],
        problem: AttributionProblem,
        test: Rows,
        removed: Rows,
    ) -> Tensor:
        """Return the same by sums of training gradients, one for each test instance and damping.

        They pass over the training gradients twice, for their norms and for products and sums, and once over
        those of left-out instances.
        """
        norms, shapes = layers.norms(), layers.gradients.shapes
        each = layers.dampings(norms, dampings, problem.further_training)
        vectors = test.dense()[:, 0]
        own = vectors.repeat(len(each[next(iter(each))]), 1)  # [E J, P]
        of_test, sums = split(vectors, shapes), split(own, shapes)
        for part, at in layers.parts():
            divisors_of = {
                group: [-((d + norms[group][at]) * layers.rows.n)[:, None] for d in each[group]]
                for group in layers.groups
            }
            if not isinstance(part, ModuleRows | DenseRows):  # factors, whose products are cheap
                grams = test.grams(part)
                factors: dict[str, Tensor] = {}
                for group, names in layers.groups.items():
                    products = sum_named(grams, names)[:, 0, :, 0].T
                    factors |= dict.fromkeys(names, torch.cat([products / w for w in divisors_of[group]], 1))
                part.add_sums({name: w[:, None] for name, w in factors.items()}, sums)
                continue
            for group, names in layers.groups.items():
                terms = [(name, term) for name in names for term in _terms(part, name)]
                if not terms:
                    continue
                products = torch.stack([term.times(of_test[name]) for name, term in terms]).sum(0)
                weights = torch.cat([products / w for w in divisors_of[group]], 1)
                for name, term in terms:
                    term.add_sums(weights, sums[name])
        for group, names in layers.groups.items():
            divisors = own.new_tensor(each[group]).repeat_interleave(test.n)[:, None]
            for name in names:
                sums[name].div_(divisors)
        return removed.times(own.T)[:, 0].T.reshape(-1, test.n, removed.n)


@dataclass(frozen=True)
class LayerGradients:
    """Training gradients by layer.

    Args:
        gradients: of the final model.
        rows: of all N training instances.
        groups: names of parameters by layer.
    """

    gradients: InstanceGradients
    rows: Rows
    groups: dict[str, list[str]]

    def norms(self) -> dict[str, Tensor]:
        """Return squared norms ``[N]`` of training gradients by layer."""
        squares = self.rows.parameter_norms()
        return {group: sum_named(squares, names)[:, 0] for group, names in self.groups.items()}

    def parts(self) -> Iterator[tuple[Rows, Tensor]]:
        """Yield some instances' gradients each, with the instances' numbers ``[n]``."""
        start = 0
        for block in self.rows.blocks():
            for part, at in parts_of(block):
                yield part, start + at
            start += block.n

    def norms_and_products(self, test: Rows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return squared norms ``[N]`` of training gradients, and products ``[J, N]`` with test ones."""
        norms: dict[str, list[Tensor]] = {group: [] for group in self.groups}
        products: dict[str, list[Tensor]] = {group: [] for group in self.groups}
        for block in self.rows.blocks():
            squares, grams = block.parameter_norms(), test.grams(block)
            for group, names in self.groups.items():
                norms[group].append(sum_named(squares, names)[:, 0])
                products[group].append(sum_named(grams, names)[:, 0, :, 0])
        return {g: torch.cat(n) for g, n in norms.items()}, {g: torch.cat(p, 1) for g, p in products.items()}

    def dampings(
        self,
        norms: dict[str, Tensor],
        dampings: Sequence[Damping],
        further_training: FurtherTraining | None,
    ) -> dict[str, list[float]]:
        """Return each layer's E dampings."""
        whole = sum(norm.double().mean().item() for norm in norms.values())
        least = LEAST * whole / self.gradients.p
        found = {}
        for group, names in self.groups.items():
            numel = sum(self.gradients.shapes[name].numel() for name in names)
            # the mean eigenvalue of the empirical Fisher is the mean squared gradient
            mean_square = max(norms[group].double().mean().item() / numel, least)
            each = [d.resolve(mean_square, mean_square, further_training) for d in dampings]
            found[group] = torch.cat(each).tolist()
        return found


def _terms(rows: ModuleRows | DenseRows, name: str) -> list[Term]:
    """Return one parameter's derivatives, as terms that add up."""
    if isinstance(rows, ModuleRows):
        return rows.held(name)
    return [Plain(split(rows.values, rows.shapes)[name])]


def sum_named(parts: dict[str, Tensor], names: list[str]) -> Tensor:
    """Return the sum of the named tensors."""
    return parts[names[0]] if len(names) == 1 else torch.stack([parts[n] for n in names]).sum(0)
