"""kronfluence's influence functions (Grosse et al., 2023; https://github.com/pomonam/kronfluence)."""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.others.foreign import (
    ForeignMethod,
    Positional,
    coverage,
    dataset,
    moved_modules,
    number,
    of_kinds,
    parsed,
)
from fimo.models.final_model import FinalModel

if TYPE_CHECKING:
    from kronfluence.task import Task

TRACKED = (nn.Linear, nn.Conv2d)
"""Layers that kronfluence has factors of; others are left out."""


class KronfluenceEkfac(ForeignMethod):
    """kronfluence's influence with Kronecker-factored curvature (Grosse et al., 2023).

    score[j, i] = (1/N) g_j^T (C + damping)^-1 g_i over linear and two-dimensional convolution layers; the
    division by N, which kronfluence leaves to its user, is ours.

    Args:
        strategy: ``ekfac``, ``kfac``, ``diagonal`` or ``identity`` (no curvature).
        damping: ``auto``: 0.1 times each module's own mean eigenvalue, kronfluence's heuristic; else a
            number, or a multiple of the mean squared gradient such as 10x, the same for all modules.
        fisher: ``sampled`` takes factors of targets that are drawn from the model's predictions, one for each
            instance; ``empirical`` of the training targets.
        seed: of the draws.
        batch_size: instances whose gradients are held at once.
    """

    packages = {"kronfluence": ("kronfluence",)}  # noqa: RUF012
    needs = "kronfluence; linear or convolutional layers"
    cost = "three passes over the training set"
    use = "to compare with `ekfac`, which has the same formula"

    def __init__(
        self,
        strategy: Literal["ekfac", "kfac", "diagonal", "identity"] = "ekfac",
        damping: float | int | str = "auto",
        fisher: Literal["sampled", "empirical"] = "sampled",
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if strategy not in ("ekfac", "kfac", "diagonal", "identity"):
            raise InputError(
                "strategy", f"expected one of ekfac, kfac, diagonal, identity but got {strategy!r}"
            )
        if fisher not in ("sampled", "empirical"):
            raise InputError("fisher", f"expected sampled or empirical but got {fisher!r}")
        if batch_size < 1:
            raise InputError("batch_size", f"expected at least 1 but got {batch_size}")
        self.damping = parsed(damping, ["auto"])
        self.strategy, self.fisher, self.seed, self.batch_size = strategy, fisher, seed, batch_size

    @property
    def predicts_loss_change(self) -> bool:
        return self.strategy != "identity"

    def unsupported(self, final_model: FinalModel, train: Instances) -> str | None:
        if moved_modules(final_model) is None:
            return "kronfluence differentiates whole modules only"
        if not of_kinds(final_model, TRACKED):
            return "the network has no linear or two-dimensional convolution layer"
        if self.fisher == "sampled" and not final_model.loss.draws:
            return "no targets can be drawn under a loss of one's own (fisher=empirical does without)"
        return None

    def notes(self, problem: AttributionProblem) -> tuple[str, ...]:
        return coverage(problem.final_model, of_kinds(problem.final_model, TRACKED))

    def import_library(self) -> None:
        import kronfluence.analyzer  # noqa: F401
        import torch._dynamo  # noqa: F401  # which kronfluence resets, and so imports

    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.utils.dataset import DataLoaderKwargs

        dtype = problem.dtype
        factors = FactorArguments(
            strategy=self.strategy, use_empirical_fisher=self.fisher == "empirical",
            activation_covariance_dtype=dtype, gradient_covariance_dtype=dtype,
            per_sample_gradient_dtype=dtype, lambda_dtype=dtype,
            covariance_max_examples=None, lambda_max_examples=None,
        )  # fmt: skip
        scores = ScoreArguments(
            damping_factor=None if self.damping.kind == "auto" else number(self.damping, problem),
            query_gradient_svd_dtype=dtype, per_sample_gradient_dtype=dtype, precondition_dtype=dtype,
            score_dtype=dtype,
        )  # fmt: skip
        positional = Positional(problem.final_model, problem.train)
        task = task_of(problem.final_model, positional.names, self.seed)
        network = prepare_model(positional, task)
        on_cpu = problem.train.targets.device.type == "cpu"
        with tempfile.TemporaryDirectory() as folder, frozen_heap():
            analyzer = Analyzer(
                "fimo", network, task, cpu=on_cpu, log_level=logging.ERROR, disable_tqdm=True,
                output_dir=folder,
            )  # fmt: skip
            analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
            analyzer.fit_all_factors("factors", dataset(problem.train), self.batch_size, factor_args=factors)
            analyzer.compute_pairwise_scores(
                "scores", "factors", dataset(problem.test), dataset(problem.removed), self.batch_size,
                self.batch_size, score_args=scores,
            )  # fmt: skip
            found: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
        return found / len(problem.train)


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Leave objects that exist already out of collections of garbage.

    kronfluence collects it ten times for one set of scores, which takes seconds in a process with many.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def task_of(final_model: FinalModel, names: Sequence[str] | None, seed: int) -> Task:
    """Return losses as kronfluence asks for them: sums over a batch, of drawn targets where it says so.

    Args:
        names: of the inputs, if they have any.
        seed: of drawn targets.
    """
    from kronfluence.task import Task

    loss, measurement = final_model.loss, final_model.measurement or final_model.loss
    tracked = [f"network.{name}" for name in of_kinds(final_model, TRACKED)]
    device = next(iter(final_model.parameters().values())).device
    generator = torch.Generator(device).manual_seed(seed)

    class Losses(Task):  # type: ignore[misc, unused-ignore]  # untyped where it is missing
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs = model(*batch[:-1])
            if not sample:
                return loss(outputs, batch[-1]).sum()
            drawn = loss.sampled_gradients(outputs.detach(), batch[-1], 1, generator)[:, 0]
            found: Tensor = (outputs * drawn).sum()  # has the gradient of the loss with a drawn target
            return found

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return measurement(model(*batch[:-1]), batch[-1]).sum()

        def get_attention_mask(self, batch: Any) -> Tensor | None:
            if names is None or "attention_mask" not in names:
                return None
            mask: Tensor = batch[names.index("attention_mask")]
            return mask

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

    return Losses()
