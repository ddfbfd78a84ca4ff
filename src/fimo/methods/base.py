"""What an attribution method is."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fimo.curvature.shared_rows import shared_at
from fimo.data.instances import Instances
from fimo.engine.leave_out import make_rule
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.attribution_problem import AttributionProblem
from fimo.models.final_model import FinalModel
from fimo.models.measured import Measured
from fimo.models.state import usual_state
from fimo.scores import Access, Scores
from fimo.validation import choices
from fimo.validation.admission import admit


class AttributionMethod(ABC):
    """Attributes test instances' losses to training instances, given a frozen final model.

    Sign: a positive score means that removing the training instance raises the test loss.

    A subclass checks its arguments in ``__init__`` (:class:`~fimo.errors.InputError`) and computes
    :meth:`scores`, a function of the problem alone: nothing is kept on the method.
    """

    needs: ClassVar[str] = ""
    """What it needs besides the final model, its loss and the data, for :func:`fimo.methods`."""

    cost: ClassVar[str] = ""
    """Its cost in words."""

    use: ClassVar[str] = ""
    """When to use it, in one sentence."""

    packages: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Names of modules of other libraries that compute the scores, by the extra that brings them."""

    @property
    def access(self) -> Access:
        """What the method needs to see."""
        return Access.FINAL_MODEL

    @property
    def predicts_loss_change(self) -> bool:
        """Whether a score is in units of test loss per removed instance (else only its order matters)."""
        return False

    @property
    def follows_further_training(self) -> bool:
        """Whether scores are ``[E, J, L]``, one for each amount of further training that is given."""
        return False

    @property
    def follows_seeds(self) -> bool:
        """Whether single seeds' runs are followed, and not only the amount of further training."""
        return self.follows_further_training

    @property
    def without_further_training(self) -> str:
        """What to choose where there is none, for an error message."""
        return ""

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        """Return why the method can't run on this model and data, or None; must be cheap."""
        return None

    def load(self) -> None:  # noqa: B027, as most need none
        """Import the libraries that it needs, so that its seconds are those of its computation."""

    def unfollowable(self, protocol: Protocol) -> str | None:
        """Return why the method can't follow this further training, or None.

        All that do differentiate its steps, follow them linearly or count them as time.
        """
        return protocol.update_rule.underivable if self.follows_further_training else None

    def why_not(self, final_model: FinalModel, train: Instances, protocol: Protocol) -> str | None:
        """Return why the method can't run on this model, data and further training, or None; it is cheap."""
        return self.inapplicable(final_model, train) or self.unfollowable(protocol)

    @abstractmethod
    def scores(self, problem: AttributionProblem) -> Scores | Tensor:
        """Return the scores of the problem's test instances for its left-out training instances.

        Returns:
            ``[J, L]``, or ``[E, J, L]`` where the method follows further training; or :meth:`result` of them,
            which says more.
        """

    def extreme_scores(self, problem: AttributionProblem, k: int) -> Scores | None:
        """Return the scores of the training instances at the ends of a test instance's order, or None.

        None: it has no way to find them that takes less than all scores. See
        :meth:`~fimo.Scores.extremes`, which a method with such a way gives the same as.
        """
        return None

    def result(self, problem: AttributionProblem, values: Tensor, **more: Any) -> Scores:
        """Return scores with what the method and the problem say of them.

        Args:
            values: ``[J, L]`` or ``[E, J, L]``; an array or lists of numbers are as good as a tensor.
            more: other fields of :class:`~fimo.scores.Scores`, such as ``sem`` or ``notes``.

        Raises:
            InputError: values of another shape, or that are no numbers.
        """
        values = self._numbers(values, problem)
        fields: dict[str, Any] = {
            "method": type(self).__name__,
            "access": self.access,
            "predicts_loss_change": self.predicts_loss_change,
        }
        given = problem.further_training
        if self.follows_further_training and given is not None:
            per_epoch = given.protocol.batches_per_epoch(len(problem.train))
            fields["step"] = torch.tensor(given.steps)
            fields["epoch"] = torch.tensor([-(-step // per_epoch) for step in given.steps])
            fields["followed"] = given.seeds if self.follows_seeds else ()
        shape = (len(problem.test), len(problem.index))
        if tuple(values.shape[-2:]) != shape or values.ndim != 2 + self.follows_further_training:
            expected = ["E"] * self.follows_further_training + [*map(str, shape)]
            raise InputError(
                type(self).__name__,
                f"expected scores of shape [{', '.join(expected)}] (test, left-out instances) but got "
                f"{list(values.shape)}",
            )
        return Scores(values, problem.index, **fields | more)

    @usual_state()
    def attribute(
        self,
        final_model: FinalModel,
        train: Instances,
        test: Instances,
        left_out: Tensor | Sequence[int] | int | None = None,
        further_training: FurtherTraining | None = None,
        extremes: int | None = None,
    ) -> Scores:
        """Return the scores of test instances for left-out training instances.

        Args:
            train: all N training instances.
            test: the J instances to explain.
            left_out: ``[L]`` indices into ``train`` (a tensor, array or list; a number means so many evenly
                spaced ones); all N when None.
            further_training: what the scores predict; methods that follow it require it.
            extremes: only those of the training instances among so many with the highest or the lowest scores
                of a test instance, or of the mean over all.

        Returns:
            values ``[J, L]`` (``[E, J, L]`` where the method follows further training) in the final model's
            dtype, on its device.

        Raises:
            InputError: the method follows further training and none was given, or one that diverges; or an
                index is out of range; or scores are NaN or infinite.
        """
        if self.follows_further_training and further_training is None:
            raise InputError(
                "further_training",
                f"{type(self).__name__} follows it, but none was given{self.without_further_training}",
            )
        if further_training is not None and (why := self.unfollowable(further_training.protocol)):
            raise InputError("further_training.optimizer", f"{type(self).__name__} does not apply: {why}")
        train, test = admit(final_model, train, test)
        if (shared := shared_at(final_model)) is not None:
            train, test = shared.set_of(train), shared.set_of(test)
        index = None if left_out is None else choices.indices(left_out, len(train), "left_out")
        if index is not None and torch.equal(index, torch.arange(len(train))):
            index = None
        given = None if further_training is None else further_training.refusing_divergence()
        problem = AttributionProblem(final_model, train, test, index, given)
        if extremes is not None:
            extremes = choices.count(extremes, "extremes")
            if (chosen := self.extreme_scores(problem, extremes)) is not None:
                return self._finite(replace(chosen, measured=Measured.supposed(final_model)))
        found = self.scores(problem)
        found = found if isinstance(found, Scores) else self.result(problem, found)
        found = replace(found, measured=Measured.supposed(final_model))
        if self.follows_further_training and not torch.isfinite(found.values[-1]).any():
            raise InputError(
                "further_training.lr",
                f"{type(self).__name__} has no finite score at the end: the full runs diverge; lower it?",
            )
        if further_training is not None and self.follows_further_training and not self.follows_seeds:
            # the amount of it alone was matched, not what its rule leaves out together
            copies = make_rule(further_training.protocol, train).multiplicity(problem.index)
            found = replace(found, values=found.values * copies.to(found.values))
        if not self.follows_further_training:
            found = self._finite(found)
        return found if extremes is None else found.extremes(extremes)

    def _numbers(self, values: Any, problem: AttributionProblem) -> Tensor:
        """Return scores as a tensor of floating-point numbers without a graph."""
        found = choices.real_numbers(values, type(self).__name__, "a tensor of scores", "scores")
        if not found.is_floating_point():
            found = found.to(next(iter(problem.final_model.parameters().values())).dtype)
        return found

    def _finite(self, found: Scores) -> Scores:
        if not (bad := (~found.values.isfinite()).sum().item()):
            return found
        kind = str(found.values.dtype).removeprefix("torch.")
        raise InputError(
            "method",
            f"{type(self).__name__} gives {bad} of {found.values.numel()} scores that are NaN or infinite; "
            f"are features or gradients so large that products leave {kind}'s range? Scale them, or give "
            "the network in float64",
        )

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Refuse what was written for an earlier version, where it would fail after hours or be ignored."""
        super().__init_subclass__(**arguments)
        named = list(inspect.signature(cls.scores).parameters)
        if len(named) != 2:
            raise InputError(
                cls.__name__,
                f"scores({', '.join(named)}) is given one problem: write scores(self, problem), with "
                "problem.final_model, .train, .test, .removed (the left-out instances), .further_training",
            )
        if "estimates_loss_change" in vars(cls):
            raise InputError(cls.__name__, "estimates_loss_change is called predicts_loss_change")
