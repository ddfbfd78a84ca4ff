"""What the stages of an audit found, for those that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fimo.audit.calibration import Calibration, Recall, calibrated, recall
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
        found, rows = [], verified.rows[verified.reference]
        for score, spread, estimates in zip(
            self.screened.score, self.screened.spread, verified.estimates, strict=True
        ):
            found.append(calibrated(score[rows], spread[rows], estimates.of(verified.reference)))
        return tuple(found)

    @cached_property
    def score_sem(self) -> Tensor:
        """Standard errors of scores ``[M, N]``: the seeds' spread, and what true effects miss by."""
        spread = self.screened.spread
        rest = [1.0 if math.isnan(c.rest) else max(1.0, c.rest) for c in self.calibrations]
        return spread * torch.tensor(rest, dtype=spread.dtype)[:, None] if rest else spread

    @cached_property
    def recall(self) -> Recall | None:
        """Of the rows that matter most for the mean test loss; None where nothing was verified."""
        if self.verified is None:
            return None
        slope = self.calibrations[0].slope
        score = self.screened.score[0] * (1.0 if math.isnan(slope) else slope)
        generator = torch.Generator().manual_seed(0)
        return recall(
            score, self.score_sem[0], self.verified.rows, self.verified.estimates[0], self.settings.top,
            generator,
        )  # fmt: skip

    @cached_property
    def own_losses(self) -> Tensor:
        """Each row's own measured loss by the final model, ``[N]`` float64."""
        question = self.question
        losses = question.final_model.measurement or question.final_model.loss
        outputs = question.final_model.outputs(question.train)
        with torch.no_grad():
            return losses(outputs, question.train.targets).double()

    @cached_property
    def suspected(self) -> tuple[int, ...]:
        """Positions of the suspects within the false discovery rate that was asked for, the surest first."""
        return () if self.suspects is None else tuple(self.suspects.within(self.settings.q).tolist())

    @cached_property
    def own_estimates(self) -> Estimates | None:
        """Measured effects of verified rows on their own losses."""
        return None if self.verified is None else self.verified.own_effect
