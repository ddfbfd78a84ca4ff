"""What methods of other libraries share: what they need, how they are handed a problem, and their silence."""

from __future__ import annotations

import contextlib
import io
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fimo.curvature.gradients import InstanceGradients
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.extras import lacking
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.damping import Damping
from fimo.models.attention import plain_attention
from fimo.models.copied import duplicate
from fimo.models.final_model import FinalModel
from fimo.scores import Scores


class ForeignMethod(AttributionMethod):
    """A method as another library implements it; the library is imported when scores are first asked for.

    It sees the final model alone, a copy of it, and its scores are brought to this package's sign (positive:
    removing the instance raises the test loss), order and dtype. Nothing of its computation is ours but what
    a docstring says.
    """

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        return lacking(self.packages) or self.unsupported(final_model, train)

    def unsupported(self, final_model: FinalModel, train: Instances) -> str | None:
        """Return why the library can't take this model and data, or None."""
        return None

    @abstractmethod
    def import_library(self) -> None:
        """Import the library."""

    def load(self) -> None:
        if lacking(self.packages) is None:
            self.import_library()

    @abstractmethod
    def foreign_scores(self, problem: AttributionProblem) -> Tensor:
        """Return the library's scores ``[J, L]``, in this package's sign."""

    def notes(self, problem: AttributionProblem) -> tuple[str, ...]:
        """Return what a reader must know of what the library leaves out."""
        return ()

    def scores(self, problem: AttributionProblem) -> Scores:
        if reason := self.inapplicable(problem.final_model, problem.train):
            raise InputError("method", f"{type(self).__name__} does not apply: {reason}")
        self.load()
        with torch.random.fork_rng(), plain_attention(), silence():
            values = self.foreign_scores(problem).detach()
        values = values.to(dtype=problem.dtype, device=problem.test.targets.device)
        return self.result(problem, values, notes=self.notes(problem))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep a library's progress bars and warnings to itself; errors are raised as ever."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class Positional(nn.Module):
    """A copy of a final model's network that takes its inputs by position, as other libraries call it.

    Only what further training moves requires gradients. Names of parameters begin with ``network.``

    Args:
        instances: whose inputs' names, if any, are those of the positions.
    """

    def __init__(self, final_model: FinalModel, instances: Instances) -> None:
        super().__init__()
        self.network = duplicate(final_model.network)
        self.names = list(instances.inputs) if isinstance(instances.inputs, dict) else None
        moved = final_model.parameters()
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in moved)

    def forward(self, *inputs: Tensor) -> Tensor:
        named = {} if self.names is None else dict(zip(self.names, inputs, strict=True))
        outputs: Tensor = self.network(**named) if named else self.network(*inputs)
        return outputs


def dataset(instances: Instances) -> TensorDataset:
    """Return instances as tuples of inputs and, last, the target."""
    tensors = instances.tensors()
    targets = tensors.pop("targets")
    return TensorDataset(*tensors.values(), targets)


def loader(instances: Instances, batch_size: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of :func:`dataset` in order; all in one when the size is None."""
    return DataLoader(dataset(instances), batch_size or len(instances))


def moved_modules(final_model: FinalModel) -> dict[str, nn.Module] | None:
    """Return the modules that hold the parameters that are trained further, by name.

    None where one of them holds others as well.
    """
    moved, found = final_model.parameters(), {}
    for name, module in final_model.network.named_modules():
        own = [f"{name}.{n}".lstrip(".") for n, _ in module.named_parameters(recurse=False)]
        if any(n in moved for n in own):
            if not all(n in moved for n in own):
                return None
            found[name] = module
    return found


def of_kinds(final_model: FinalModel, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Return those of the trained modules that are of some kinds, by name."""
    return {n: m for n, m in (moved_modules(final_model) or {}).items() if isinstance(m, kinds)}


def coverage(final_model: FinalModel, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return a note of how many of the trained parameters are in some modules; nothing where all are."""
    moved = final_model.parameters()
    own = (
        ".".join(filter(None, (n, k)))
        for n, m in modules.items()
        for k, _ in m.named_parameters(recurse=False)
    )
    size = sum(moved[name].numel() for name in own if name in moved)
    share = size / final_model.size
    return () if share == 1 else (f"{share:.0%} of the parameters covered, those of {', '.join(modules)}",)


def number(damping: Damping, problem: AttributionProblem) -> float:
    """Return a damping as a number, in units of the mean training loss per squared parameter."""
    if damping.kind == "absolute":
        return damping.value
    norms = InstanceGradients(problem.final_model).losses(problem.train).squared_norms()
    return damping.value * norms.double().mean().item() / problem.final_model.size


def parsed(damping: float | int | str, others: Sequence[str] = ()) -> Damping:
    """Return a damping that a library can be given.

    Args:
        others: kinds that are allowed besides a number and a multiple such as 10x.

    Raises:
        InputError: another one.
    """
    found = Damping.parse(damping)
    if found.kind not in ("absolute", "relative", *others):
        allowed = ", ".join(["a number", "a multiple such as 10x", *others])
        raise InputError("damping", f"expected {allowed} but got {damping!r}")
    return found
