"""captum's influence functions (Kokhlikyan et al., 2020; https://captum.ai)."""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.embedding import no_representation
from fimo.methods.others.foreign import (
    ForeignMethod,
    Positional,
    dataset,
    loader,
    moved_modules,
    of_kinds,
)
from fimo.methods.representer import Representer
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import Loss

PER_BATCH = (nn.Linear, nn.Conv2d)
"""Of which captum computes the gradients of a batch's instances together; of others one by one."""


class CaptumMethod(ForeignMethod):
    """What captum's methods share."""

    packages = {"captum": ("captum",)}  # noqa: RUF012

    def import_library(self) -> None:
        import captum.influence  # noqa: F401


class Batched(CaptumMethod):
    """What those share that take instances in batches.

    Args:
        batch_size: instances whose gradients, or representations, are held at once.
    """

    def __init__(self, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise InputError("batch_size", f"expected at least 1 but got {batch_size}")
        self.batch_size = batch_size


class CaptumTracIn(Batched):
    """captum's TracInCP at the final model alone: inner products of loss gradients (Pruthi et al., 2020).

    score[j, i] = <g_j, g_i>, as ``tracin`` and ``graddot`` here. Gradients of a batch are taken together
    where linear and two-dimensional convolution layers are all that is trained, else one by one, as captum
    has it.
    """

    needs = "captum"
    cost = "one gradient of each instance"
    use = "to compare with `tracin`, which has the same formula"

    def unsupported(self, final_model: FinalModel, train: Instances) -> str | None:
        return None if moved_modules(final_model) else "captum differentiates whole modules only"

    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        from captum.influence import TracInCP

        network = Positional(problem.final_model, problem.train)
        method = TracInCP(
            network, dataset(problem.removed), ["final"], _nothing, batch_size=self.batch_size,
            **differentiated(problem.final_model),
        )  # fmt: skip
        found: Tensor = method.influence(loader(problem.test, self.batch_size))
        return found


class CaptumTracInFast(Batched):
    """captum's TracInCPFast at the final model alone: of the last linear layer's weight only.

    score[j, i] = <r_j, r_i> <h_j, h_i>, r the loss's derivative in the layer's outputs and h its inputs, as
    ``representer`` here; the layer's bias is left out.
    """

    needs = "captum; outputs that are a last linear layer's"
    cost = "forward passes"
    use = "to compare with `representer`, which has the same formula"

    def unsupported(self, final_model: FinalModel, train: Instances) -> str | None:
        return Representer().inapplicable(final_model, train)

    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        from captum.influence import TracInCPFast

        network, model = Positional(problem.final_model, problem.train), problem.final_model
        last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        method = TracInCPFast(
            network, last, dataset(problem.removed), ["final"], _nothing, Summed(model.loss),
            self.batch_size, Summed(model.measurement or model.loss),
        )  # fmt: skip
        found = [method.influence(batch) for batch in loader(problem.test, self.batch_size)]
        return torch.cat(found)


class CaptumArnoldi(Batched):
    """captum's Arnoldi influence function (Schioppa et al., 2022).

    score[j, i] = g_j^T R R^T g_i with R R^T the inverse of the Hessian of the *summed* training loss on its
    largest ``rank`` eigenvalues in a Krylov space, the same as (1/N) g_j^T H^-1 g_i of the mean loss.

    Args:
        rank: largest eigenvalues that are kept, at most.
        iterations: dimension of the Krylov space.
        tolerance: the iteration ends where a new vector is shorter.
        damping: added to the eigenvalues of the summed loss's Hessian.
        smallest: eigenvalues below it are left out.
        seed: of the first vector.
    """

    needs = "captum"
    cost = "`iterations` products with the Hessian, then inner products in `rank` dimensions"
    use = "to compare with `arnoldi`, which takes Gauss-Newton for the Hessian"

    def __init__(
        self,
        rank: int = 50,
        iterations: int = 200,
        tolerance: float = 0.1,
        damping: float = 1e-3,
        smallest: float = 1e-4,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        super().__init__(batch_size)
        for name, value in (("rank", rank), ("iterations", iterations)):
            if value < 1:
                raise InputError(name, f"expected at least 1 but got {value}")
        self.rank, self.iterations, self.tolerance = rank, iterations, tolerance
        self.damping, self.smallest, self.seed = damping, smallest, seed

    @property
    def predicts_loss_change(self) -> bool:
        return True

    def unsupported(self, final_model: FinalModel, train: Instances) -> str | None:
        return None if moved_modules(final_model) else "captum differentiates whole modules only"

    def import_library(self) -> None:
        import captum.influence._core.arnoldi_influence_function  # noqa: F401

    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

        network = Positional(problem.final_model, problem.train)
        method = ArnoldiInfluenceFunction(
            network, dataset(problem.removed), "final", _nothing, batch_size=self.batch_size,
            hessian_dataset=loader(problem.train), projection_dim=self.rank, seed=self.seed,
            arnoldi_dim=self.iterations, arnoldi_tol=self.tolerance, hessian_reg=self.damping,
            hessian_inverse_tol=self.smallest, projection_on_cpu=False, **differentiated(problem.final_model),
        )  # fmt: skip
        found: Tensor = method.influence(loader(problem.test, self.batch_size))
        return found


class CaptumSimilarity(CaptumMethod):
    """captum's similarity of hidden representations: what enters the last linear layer.

    Args:
        similarity: ``cosine`` or ``euclidean`` (minus the distance).
        layer: name of the module whose output is the representation; the one before the last linear layer
            of a sequence when None.
    """

    needs = "captum; a sequence of layers, or `layer`"
    cost = "one pass"
    use = "to compare with `embedding`, which has the same formula"

    def __init__(
        self,
        similarity: Literal["cosine", "euclidean"] = "cosine",
        layer: str | None = None,
    ) -> None:
        if similarity not in ("cosine", "euclidean"):
            raise InputError("similarity", f"expected cosine or euclidean but got {similarity!r}")
        self.similarity, self.layer = similarity, layer

    def unsupported(self, final_model: FinalModel, train: Instances) -> str | None:
        if self.layer is not None:
            return no_representation(final_model, self.layer)
        if isinstance(train.inputs, dict) or before_last(final_model.network) is None:
            return "no module is known whose output is the representation (layer names one)"
        return None

    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        from captum.influence import SimilarityInfluence
        from captum.influence._core.similarity_influence import cosine_similarity, euclidean_distance

        cosine, count = self.similarity == "cosine", len(problem.removed)
        measure = cosine_similarity if cosine else euclidean_distance

        def similarity(ours: Tensor | list[Tensor], theirs: Tensor) -> Tensor:
            # captum 0.9 gives its own metrics a list where it expects a tensor
            found: Tensor = measure(ours[0] if isinstance(ours, list) else ours, theirs)
            return found

        network = Positional(problem.final_model, problem.train)
        layer = f"network.{self.layer or before_last(problem.final_model.network)}"
        with tempfile.TemporaryDirectory() as folder:
            method = SimilarityInfluence(
                network, layer, _InputsOnly(problem.removed), folder, similarity_metric=similarity,
                similarity_direction="max" if cosine else "min", batch_size=count,
            )  # fmt: skip
            order, values = method.influence(_inputs(problem.test), count, load_src_from_disk=False)[layer]
        found = torch.empty_like(values).scatter_(1, order, values)  # back from sorted
        return found if cosine else -found


class _InputsOnly(torch.utils.data.Dataset[Any]):
    """Inputs of instances, without targets, as captum's activations are made from."""

    def __init__(self, instances: Instances) -> None:
        self.inputs = _inputs(instances)

    def __len__(self) -> int:
        return len(self.inputs[0]) if isinstance(self.inputs, tuple) else len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return tuple(t[index] for t in self.inputs) if isinstance(self.inputs, tuple) else self.inputs[index]


def _inputs(instances: Instances) -> Tensor | tuple[Tensor, ...]:
    return tuple(instances.inputs.values()) if isinstance(instances.inputs, dict) else instances.inputs


def before_last(network: nn.Module) -> str | None:
    """Return the name of the module before the last linear layer of a sequence, or None."""
    if not isinstance(network, nn.Sequential):
        return None
    children = list(network.named_children())
    last = max((k for k, (_, m) in enumerate(children) if isinstance(m, nn.Linear)), default=0)
    return children[last - 1][0] if last > 0 else None


def differentiated(final_model: FinalModel) -> dict[str, Any]:
    """Return captum's arguments that say which gradients of which losses are taken, and how."""
    modules = moved_modules(final_model) or {}
    whole = final_model.size == sum(p.numel() for p in final_model.network.parameters())
    together = len(of_kinds(final_model, PER_BATCH)) == len(modules)
    wrapped = Summed if together else Each
    return {
        "layers": None if whole else [f"network.{name}" for name in modules],
        "loss_fn": wrapped(final_model.loss),
        "test_loss_fn": wrapped(final_model.measurement or final_model.loss),
        "sample_wise_grads_per_batch": together,
    }


class Summed(nn.Module):
    """The sum of a batch's losses, with the attribute by which captum knows it."""

    reduction = "sum"

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets).sum()


class Each(Summed):
    """The losses of a batch's instances."""

    reduction = "none"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets)


def _nothing(network: nn.Module, checkpoint: str) -> float:
    """Load no checkpoint, as the network is at the final model; its learning rate is 1."""
    return 1.0
