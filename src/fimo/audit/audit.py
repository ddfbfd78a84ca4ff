"""The story of an audit: screen all rows, verify those that matter, say what was found."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fimo.audit.findings import Findings
from fimo.audit.question import Question, Resources, Settings
from fimo.audit.result import Audit
from fimo.audit.screen import screen
from fimo.audit.summary import summary_of
from fimo.audit.tables import pairs_of, rows_of
from fimo.audit.verify import verify
from fimo.further_training.seeds import other_seeds

log = logging.getLogger(__name__)


def audit(question: Question, settings: Settings, resources: Resources) -> Audit:
    """Say which training rows matter, surely.

    Raises:
        InputError: more rows asked for than there are.
    """
    settings.fitting(len(question.train))
    seconds: dict[str, float] = {}
    with _stage("screen", seconds):
        screened = screen(question, other_seeds(range(settings.seeds)), resources)
    verified = None
    if settings.verify:
        with _stage("verify", seconds):
            verified = verify(question, screened, settings, resources)
    findings = Findings(question, settings, screened, verified, seconds)
    return Audit(rows_of(findings), pairs_of(findings), summary=summary_of(findings))


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
    log.info("audit, %s: %.1f s", name, seconds[name])
