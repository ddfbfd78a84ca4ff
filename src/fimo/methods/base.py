"""What an attribution method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.applicability import unfollowable
from fimo.models.final_model import FinalModel
from fimo.scores import Access
from fimo.validation import choices
from fimo.validation.admission import admit


class AttributionMethod(ABC):
    """Attributes test instances' losses to training instances, given a frozen final model.

    Sign: a positive score means that removing the training instance raises the test loss.

    A subclass checks its arguments in ``__init__`` (:class:`~fimo.errors.InputError`), precomputes on
    the training set in :meth:`fit`, and returns scores from :meth:`scores`.
    """

    access: ClassVar[Access] = Access.FINAL_MODEL
    estimates_loss_change: ClassVar[bool] = False
    """Whether a score is in units of test loss per removed instance (else only its order matters)."""

    follows_further_training: bool = False
    """Whether scores are ``[E, J, L]``, one for each amount of further training that is given."""

    @property
    def follows_seeds(self) -> bool:
        """Whether single seeds' runs are followed, and not only the amount of further training."""
        return self.follows_further_training

    without_further_training: str = ""
    """What to choose where there is none, for an error message."""

    further_training: FurtherTraining | None = None
    """The further training to predict, where the method follows it."""

    left_out: Tensor
    """``[L]`` training indices that :meth:`attribute` was given."""

    gradient_evaluations: int = 0
    """Instance gradients (or products of one instance's Jacobian) computed so far: the declared cost."""

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        """Return why the method can't run on this model and data, or None; must be cheap."""
        return None

    def fit(self, final_model: FinalModel, train: Instances) -> None:
        """Precompute what depends on the training set alone."""
        self.final_model, self.train = final_model, train

    @abstractmethod
    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        """Return the scores of test instances for left-out training instances.

        Returns:
            ``[J, L]``, or ``[E, J, L]`` where the method follows further training.
        """

    def attribute(
        self,
        final_model: FinalModel,
        train: Instances,
        test: Instances,
        left_out: Tensor | Sequence[int] | int | None = None,
        further_training: FurtherTraining | None = None,
    ) -> Tensor:
        """Fit, then score.

        Args:
            train: all N training instances.
            test: the J instances to explain.
            left_out: ``[L]`` indices into ``train`` (a tensor, array or list; a number means so many evenly
                spaced ones); all N when None.
            further_training: what the scores predict; methods that follow it require it.

        Returns:
            ``[J, L]`` (``[E, J, L]`` where the method follows further training) in the final model's dtype,
            on its device.

        Raises:
            InputError: the method follows further training and none was given, or an index is out of range.
        """
        if self.follows_further_training and further_training is None:
            raise InputError(
                "further_training",
                f"{type(self).__name__} follows it, but none was given{self.without_further_training}",
            )
        if further_training is not None and (why := unfollowable(self, further_training.protocol)):
            raise InputError("further_training.optimizer", f"{type(self).__name__} does not apply: {why}")
        train, test = admit(final_model, train, test)
        self.further_training = further_training
        self.left_out = choices.indices(left_out, len(train), "left_out")
        self.fit(final_model, train)
        return self.scores(test, train if left_out is None else train[self.left_out.to(train.targets.device)])
