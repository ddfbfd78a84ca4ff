"""dattri's attributors (Deng et al., 2024; https://github.com/TRAIS-Lab/dattri)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.func import functional_call

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.others.foreign import (
    ForeignMethod,
    Positional,
    coverage,
    loader,
    moved_modules,
    number,
    of_kinds,
    parsed,
)
from fimo.methods.others.projected import ProjectedMethod, explained, of_one
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import LossFunction

if TYPE_CHECKING:
    from dattri.task import AttributionTask


class DattriMethod(ForeignMethod):
    """What dattri's methods share."""

    packages = {"dattri": ("dattri",)}  # noqa: RUF012

    def import_library(self) -> None:
        import dattri.algorithm  # noqa: F401


class DattriInfluence(DattriMethod):
    """What dattri's influence functions share: scores (1/N) g_j^T C^-1 g_i, where the 1/N is ours.

    Args:
        damping: of C: a number, or a multiple of the mean squared gradient such as 10x. dattri's own default
            is none, with which C of more parameters than instances can't be inverted.
        batch_size: instances whose gradients are held at once.
    """

    def __init__(self, damping: float | int | str = "10x", batch_size: int = 64) -> None:
        if batch_size < 1:
            raise InputError("batch_size", f"expected at least 1 but got {batch_size}")
        self.damping, self.batch_size = parsed(damping), batch_size

    @property
    def predicts_loss_change(self) -> bool:
        return True


class DattriCg(DattriInfluence):
    """dattri's IF-CG: the inverse Hessian by a fixed number of conjugate gradient steps (Martens, 2010).

    score[j, i] = (1/N) g_j^T (H + damping)^-1 g_i with the Hessian H of the mean training loss, from all
    training instances in one batch: of several, dattri adds up inverses where the mean Hessian's is meant.

    Args:
        iterations: of conjugate gradients; none of them is left out once they have converged.
    """

    needs = "dattri; damping that makes the Hessian positive"
    cost = "`iterations` products with the Hessian for each test instance"
    use = "to compare with `cg`, which takes Gauss-Newton for the Hessian, and stops when it has converged"

    def __init__(
        self, damping: float | int | str = "10x", iterations: int = 10, batch_size: int = 64
    ) -> None:
        super().__init__(damping, batch_size)
        if iterations < 1:
            raise InputError("iterations", f"expected at least 1 but got {iterations}")
        self.iterations = iterations

    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        from dattri.algorithm import IFAttributorCG

        method = IFAttributorCG(
            task_of(problem), device=str(problem.train.targets.device), max_iter=self.iterations,
            regularization=number(self.damping, problem),
        )  # fmt: skip
        method.cache(loader(problem.train))
        found: Tensor = method.attribute(
            loader(problem.removed, self.batch_size), loader(problem.test, self.batch_size)
        )
        return found.T / len(problem.train)


class DattriEkfac(DattriInfluence):
    """dattri's EK-FAC, with factors of the training targets' own gradients, over linear layers.

    dattri 0.3.0 projects on the rows of the matrices whose columns are the eigenvectors, so that its scores
    are other ones than EK-FAC's.
    """

    needs = "dattri; linear layers of inputs [n, d]; the loss as measurement"
    cost = "three passes over the training set"
    use = "to compare with `ekfac` (fisher=empirical)"

    def unsupported(self, final_model: FinalModel, train: Instances) -> str | None:
        modules = moved_modules(final_model)
        if modules is None:
            return "dattri's EK-FAC takes whole modules only"
        if final_model.measurement is not None:
            return "dattri takes the curvature of what is explained, which must be the loss then"
        linear = of_kinds(final_model, (nn.Linear,))
        if not linear:
            return "the network has no linear layer"
        flat = _flat(final_model, train, linear)
        return None if flat else "dattri's EK-FAC takes linear layers of inputs [n, d] only"

    def notes(self, problem: AttributionProblem) -> tuple[str, ...]:
        return coverage(problem.final_model, of_kinds(problem.final_model, (nn.Linear,)))

    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        from dattri.algorithm import IFAttributorEKFAC

        linear = of_kinds(problem.final_model, (nn.Linear,))
        method = IFAttributorEKFAC(
            task_of(problem), [f"network.{name}" for name in linear],
            str(problem.train.targets.device), number(self.damping, problem),
        )  # fmt: skip
        method.cache(loader(problem.train, self.batch_size))
        found: Tensor = method.attribute(
            loader(problem.removed, self.batch_size), loader(problem.test, self.batch_size)
        )
        return found.T / len(problem.train)


class DattriTrak(ProjectedMethod, DattriMethod):
    """dattri's TRAK of the final model alone (Park et al., 2023).

    See :class:`~fimo.methods.others.projected.ProjectedMethod`.

    Args:
        dimension: of the projection; when None a quarter of the training instances, at most 2,048.
        damping: added to the second moments of gradients that dattri divides by the root of their number of
            entries and projects.
        seed: of the projection.
        batch_size: instances whose gradients are held at once.
    """

    needs = "dattri; more instances than dimensions, or damping"
    cost = "one projected gradient of each instance"
    use = "to compare with `trak`, which has the same formula"

    def kernel(self, problem: AttributionProblem, dimension: int) -> Tensor:
        from dattri.algorithm import TRAKAttributor
        from dattri.task import AttributionTask

        model, device = problem.final_model, str(problem.train.targets.device)
        network = Positional(model, problem.train)
        scalar, target, slope = (
            of_one(network, f) for f in (model.loss.scalar_output, explained(model), model.loss.scalar_slope)
        )
        task = AttributionTask(
            lambda p, data: scalar(p, *data), network, network.state_dict(), lambda p, data: target(p, *data)
        )
        projector = {
            "proj_dim": dimension, "proj_max_batch_size": self.batch_size, "proj_seed": self.seed,
            "device": device,
        }  # fmt: skip
        method = TRAKAttributor(
            task, lambda p, data: 1 + slope(p, *data), projector, device=device, regularization=self.damping
        )
        method.cache(loader(problem.train, self.batch_size))
        found: Tensor = method.attribute(loader(problem.test, self.batch_size))  # of all N, [N, J]
        return found.T[:, problem.index.to(found.device)]


def task_of(problem: AttributionProblem) -> AttributionTask:
    """Return a final model's losses, means over a batch, as dattri asks for them."""
    from dattri.task import AttributionTask

    model = problem.final_model
    network = Positional(model, problem.train)

    def mean_of(loss: LossFunction) -> Callable[[dict[str, Tensor], tuple[Tensor, ...]], Tensor]:
        def mean(parameters: dict[str, Tensor], data: tuple[Tensor, ...]) -> Tensor:
            return loss(functional_call(network, parameters, data[:-1]), data[-1]).mean()

        return mean

    return AttributionTask(
        mean_of(model.loss), network, network.state_dict(), mean_of(model.measurement or model.loss)
    )


def _flat(final_model: FinalModel, train: Instances, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether inputs of some modules are ``[n, d]``."""
    dimensions: list[int] = []
    handles = [
        m.register_forward_pre_hook(lambda _, x: dimensions.append(x[0].ndim)) for m in modules.values()
    ]
    try:
        final_model.outputs(train[:1])
    finally:
        for handle in handles:
            handle.remove()
    return set(dimensions) == {2}
