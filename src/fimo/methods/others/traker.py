"""TRAK by its authors (Park et al., 2023; https://github.com/MadryLab/trak)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.others.foreign import Positional, loader
from fimo.methods.others.projected import ProjectedMethod, explained, of_one


class TrakerTrak(ProjectedMethod):
    """TRAK by its authors, of the final model alone (Park et al., 2023).

    See :class:`~fimo.methods.others.projected.ProjectedMethod`.

    Args:
        dimension: of the projection; when None a quarter of the training instances, at most 2,048.
        damping: added to the second moments of gradients that traker divides by the root of their number of
            entries and projects.
        half_precision: keep features in float16, traker's default.
        seed: of the projection.
        batch_size: instances whose gradients are held at once.
    """

    packages = {"traker": ("trak",)}  # noqa: RUF012
    needs = "traker; more instances than dimensions, or damping"
    cost = "one projected gradient of each instance"
    use = "to compare with `trak`, which has the same formula"

    def __init__(
        self,
        dimension: int | None = None,
        damping: float = 0.0,
        half_precision: bool = False,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        super().__init__(dimension, damping, seed, batch_size)
        self.half_precision = half_precision

    def import_library(self) -> None:
        import trak  # noqa: F401

    def kernel(self, problem: AttributionProblem, dimension: int) -> Tensor:
        from trak import TRAKer

        model, train = problem.final_model, problem.train
        network = Positional(model, train)
        output = output_of(network, model.loss.scalar_output, model.loss.scalar_slope)
        moved = [name for name, p in network.named_parameters() if p.requires_grad]
        with tempfile.TemporaryDirectory() as folder:
            method = TRAKer(
                network, output, len(train), folder,
                device=str(train.targets.device), proj_dim=dimension, logging_level=logging.ERROR,
                use_half_precision=self.half_precision, proj_max_batch_size=self.batch_size,
                projector_seed=self.seed, grad_wrt=moved, lambda_reg=self.damping,
            )  # fmt: skip
            method.load_checkpoint(network.state_dict(), model_id=0)
            for batch in loader(train, self.batch_size):
                method.featurize(batch, num_samples=len(batch[-1]))
            method.finalize_features()
            _drawn_again(method.projector)
            method.gradient_computer.modelout_fn = output_of(network, explained(model), None)
            method.start_scoring_checkpoint("test", network.state_dict(), 0, len(problem.test))
            for batch in loader(problem.test, self.batch_size):
                method.score(batch, num_samples=len(batch[-1]))
            found = torch.from_numpy(method.finalize_scores("test").copy())  # of all N, [N, J]
        return found.T[:, problem.index.cpu()].to(train.targets.device)


def _drawn_again(projector: Any) -> None:
    """Draw the matrix of a projector in one block again, which traker 0.3.2 has freed and does not miss."""
    if getattr(projector, "num_blocks", 0) == 1:
        projector.generate_sketch_matrix(projector.generator_states[0])


def output_of(
    network: Positional,
    scalar: Callable[[Tensor, Tensor], Tensor],
    slope: Callable[[Tensor, Tensor], Tensor] | None,
) -> object:
    """Return what traker takes the gradients of, and weighs them with.

    Args:
        scalar: of outputs and targets, ``[n]``.
        slope: the loss's derivative in it; None where it is not asked for.
    """
    value = of_one(network, scalar)

    class Output:
        """As traker's AbstractModelOutput."""

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, *instance: Tensor) -> Tensor:
            return value({**weights, **buffers}, *instance)

        @staticmethod
        def get_out_to_loss_grad(model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            assert slope is not None
            outputs = torch.func.functional_call(network, (weights, buffers), tuple(batch[:-1]))
            return -slope(outputs, batch[-1]).detach()[:, None]

    return Output()
