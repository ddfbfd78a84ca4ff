"""The story of an audit: screen all rows, verify those that matter, say what was found."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fimo.audit.acting import Acted, Acting, judged
from fimo.audit.findings import Findings
from fimo.audit.precision import resolved
from fimo.audit.question import Question, Resources, Settings
from fimo.audit.result import Audit
from fimo.audit.screen import screen
from fimo.audit.summary import summary_of
from fimo.audit.suspects import Suspects, inapplicable, suspects
from fimo.audit.tables import pairs_of, rows_of
from fimo.audit.verify import verify
from fimo.further_training.seeds import other_seeds

log = logging.getLogger(__name__)


def audit(question: Question, settings: Settings, resources: Resources) -> Audit:
    """Say which training rows matter, surely, and what to do about them.

    Raises:
        InputError: more rows asked for than there are.
    """
    settings.fitting(len(question.train))
    acts = settings.verify and settings.act
    question = replace(question, judged=acts and judged(len(question.test)))
    seconds: dict[str, float] = {}
    with _stage("screen", seconds):
        screened = screen(question, other_seeds(range(settings.seeds)), resources)
    verified = None
    if settings.verify:
        with _stage("verify", seconds):
            question = resolved(question, screened, resources)
            verified = verify(question, screened, settings, resources)
    with _stage("suspects", seconds):
        suspicious = suspected(question)
    findings = Findings(question, settings, screened, verified, suspicious, seconds)
    acted = Acted()
    if acts and verified is not None:
        acted = act(Acting(findings, verified, resources, findings.suspected), seconds)
    summary = {**summary_of(findings), **acted.summary}
    return Audit(rows_of(findings), pairs_of(findings), summary=summary, **acted.tables)


def suspected(question: Question) -> Suspects | None:
    """Return which rows' targets are probably wrong; None, with a word in the log, where none can tell."""
    if (why := inapplicable(question.final_model, question.train)) is not None:
        log.info("no wrong targets are looked for: %s", why)
        return None
    return suspects(question.final_model, question.train, question.protocol)


def act(acting: Acting, seconds: dict[str, float]) -> Acted:
    """Go through the stages after verification, while there is time."""
    question, minutes = acting.findings.question, acting.findings.settings.minutes
    found = Acted(cleaned=acting.cleaned(), removed=acting.removed)

    def there_is_time(name: str) -> bool:
        if minutes is None or sum(seconds.values()) < 60 * minutes:
            return True
        log.warning("no %s: audit.minutes=%g are over", name, minutes)
        return False

    if question.tests and there_is_time("answers"):
        with _stage("answers", seconds):
            found = replace(found, answers=acting.answers())
    if question.judged and there_is_time("proof of cleaning"):
        with _stage("proof", seconds):
            found = replace(found, proof=acting.proof())
    if there_is_time("groups"):
        with _stage("groups", seconds):
            found = replace(found, groups=acting.groups())
    return found


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
    log.info("audit, %s: %.1f s", name, seconds[name])
