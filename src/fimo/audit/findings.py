"""What the stages of an audit found, for those that follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fimo.audit.calibration import Calibration, Errors, Recall, calibrated, errors, recall, sizes
from fimo.audit.question import Question, Settings
from fimo.audit.screen import Screened
from fimo.audit.suspects import Suspects
from fimo.audit.verdicts import Estimates
from fimo.audit.verify import Verified


@dataclass(frozen=True)
class Findings:
    """What an audit found.

    Args:
        screened: predicted effects of all N rows.
        verified: measured effects of some; None where nothing was verified.
        suspects: rows whose targets may be wrong; None where they were not looked for.
        seconds: of each stage.
    """

    question: Question
    settings: Settings
    screened: Screened
    verified: Verified | None = None
    suspects: Suspects | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def calibrations(self) -> tuple[Calibration, ...]:
        """Of each target, by the random rows; none where nothing was verified."""
        verified = self.verified
        if verified is None:
            return ()
        reference = verified.reference
        return tuple(
            calibrated(score[verified.rows[reference]], estimates.of(reference))
            for score, estimates in zip(self.screened.score, verified.estimates, strict=True)
        )

    @cached_property
    def errors(self) -> tuple[Errors, ...]:
        """Of each target's scores, by all rows that were left out."""
        verified, screened = self.verified, self.screened
        if verified is None:
            return tuple(Errors() for _ in screened.score)
        rows, size = verified.rows, sizes(screened.spread)
        return tuple(
            errors(screened.score[m, rows], size[m, rows], estimates)
            for m, estimates in enumerate(verified.estimates)
        )

    @cached_property
    def score_sem(self) -> Tensor:
        """Standard errors of scores ``[M, N]``.

        In proportion to what seeds disagree by, to the scale of what measured effects miss the scores by;
        where nothing was measured, what the mean over seeds is uncertain by alone.
        """
        scale = torch.tensor([found.scale for found in self.errors], dtype=torch.float64)
        return scale[:, None] * sizes(self.screened.spread)

    @cached_property
    def recall(self) -> Recall | None:
        """Of the rows that matter most for the mean test loss; None where nothing was verified."""
        if self.verified is None:
            return None
        return recall(
            self.screened.score[0], sizes(self.screened.spread)[0], self.errors[0], self.verified.rows,
            self.verified.estimates[0], self.settings.top, torch.Generator().manual_seed(0),
        )  # fmt: skip

    @cached_property
    def own_losses(self) -> Tensor:
        """Each row's own training loss by the final model, ``[N]`` float64."""
        return self.question.final_model.losses(self.question.train).double()

    @cached_property
    def suspected(self) -> tuple[int, ...]:
        """Positions of the suspects within the false discovery rate that was asked for, the surest first."""
        return () if self.suspects is None else tuple(self.suspects.within(self.settings.q).tolist())

    @cached_property
    def own_estimates(self) -> Estimates | None:
        """Measured effects of verified rows on their own losses."""
        return None if self.verified is None else self.verified.own_effect
