"""What is measured of test instances: its name, and which direction of it is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fimo.errors import InputError

if TYPE_CHECKING:  # reports are read without torch
    from fimo.models.final_model import FinalModel


@dataclass(frozen=True)
class Measured:
    """What effects and scores are changes of, by removal.

    Args:
        name: as in *mean test loss*.
        better: 1 where a smaller value is better, as of a loss; -1 where a larger one is, as of a
            probability. So an instance helps where ``better`` times its effect is positive.
        known: whether ``better`` is; else it is taken to be a loss's.
    """

    name: str = "loss"
    better: int = 1
    known: bool = True

    @classmethod
    def of(cls, final_model: FinalModel) -> Measured:
        """Return what a final model measures.

        Raises:
            InputError: ``model.measurement``: a function of the user's own that doesn't say what is better.
        """
        found = cls.supposed(final_model)
        if not found.known:
            problem = f"expected {found.name}.better to be 1 (a smaller value is better, as of a loss) or -1"
            raise InputError("model.measurement", f"{problem} (a larger one is) but it isn't set")
        return found

    @classmethod
    def supposed(cls, final_model: FinalModel) -> Measured:
        """Return the same; what doesn't say which direction is better is taken to be a loss."""
        measurement = final_model.measurement
        if measurement is None or measurement.definition is final_model.loss.definition:
            return cls()
        better = measurement.better
        if better not in (1, -1, None):
            problem = f"expected {measurement.quantity}.better to be 1 or -1 but got {better!r}"
            raise InputError("model.measurement", problem)
        return cls(measurement.quantity, better or 1, better is not None)

    @property
    def unknown(self) -> str:
        """How to say which direction is better, in a sentence."""
        return (
            f"What is measured, {self.name}, is taken as a loss, of which smaller values are better: set "
            f"{self.name}.better = -1 where larger ones are, or 1 where this is right."
        )

    @property
    def mean(self) -> str:
        """The name of its mean over test instances."""
        return f"mean test {self.name}"

    @property
    def worsens(self) -> str:
        """What it does where predictions get worse, as without an instance that helps."""
        return "rises" if self.better > 0 else "falls"

    @property
    def improves(self) -> str:
        """What it does where predictions get better, as without an instance that harms."""
        return "falls" if self.better > 0 else "rises"

    @property
    def positive(self) -> str:
        """What an instance of a positive effect does."""
        return "helps" if self.better > 0 else "harms"
