"""What a task's table is drawn as: one line for each method, mean ± standard error over some column."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fimo.models.measured import Measured

COLUMNS = ("method", "mean", "sem")
"""Besides the column that lines run over; ``ceiling`` (and ``ceiling_lower``) are drawn where there are."""


@dataclass(frozen=True)
class Curve:
    """How a task's table is drawn, in every report and figure.

    Args:
        x: the column that lines run over; ``epoch`` (beside ``step``) for the amount of further training.
            Over other columns only rows of the last ``step`` are drawn, where there are several.
        x_title, y_title: of the axes.
        caption: of the figure, in a sentence or two.
    """

    x: str
    x_title: str
    y_title: str
    caption: str

    def missing(self, columns: Collection[str]) -> list[str]:
        """Return the columns that a table lacks."""
        needed = [*COLUMNS, self.x, *(["step"] if self.x == "epoch" else [])]
        return [name for name in needed if name not in columns]


EPOCHS = "epochs of further training"

DATAMODELING = Curve(
    "epoch",
    EPOCHS,
    "LDS (spearman)",
    "Linear datamodeling score: do summed scores rank the effects of leaving out large random subsets? "
    "Dashed grey: the noise ceiling, shaded down to the lower one.",
)


def removal(measured: Measured) -> Curve:
    """Return the curve of leaving out a method's most helpful instances."""
    return Curve(
        "removed",
        "training instances left out",
        f"change of the {measured.mean}",
        f"Removal: how the test {measured.name} changes when a method's most helpful training instances are "
        f"left out together. {'Higher' if measured.better > 0 else 'Lower'} is better; grey: random ones.",
    )


REMOVAL = removal(Measured())
KNOWN = {"datamodeling": DATAMODELING, "removal": REMOVAL}
"""Of runs whose folder doesn't say it."""
