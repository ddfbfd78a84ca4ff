"""The story of an audit: screen all rows, verify those that matter, say what was found."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from fimo.audit.acting import Acted, Acting, judged
from fimo.audit.findings import Findings
from fimo.audit.out_of_sample import OutOfSample
from fimo.audit.precision import resolved
from fimo.audit.question import Question, Resources, Settings
from fimo.audit.result import Audit
from fimo.audit.screen import screen
from fimo.audit.summary import summary_of
from fimo.audit.suspects import Suspects, inapplicable, suspects
from fimo.audit.tables import pairs_of, rows_of
from fimo.audit.verify import verify
from fimo.further_training.seeds import other_seeds
from fimo.store.files import read_tensors, write_tensors
from fimo.store.fingerprint import Key, kept, out_of_sample_key, suspects_key

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
    suspicious = None
    if _there_is_time("suspects", settings, seconds):
        with _stage("suspects", seconds):
            suspicious = suspected(question, settings.certain_labels, resources)
    findings = Findings(question, settings, screened, verified, suspicious, seconds)
    acted = Acted()
    if acts and verified is not None:
        acted = act(Acting(findings, verified, resources, findings.suspected), seconds)
    summary = {**summary_of(findings), **acted.summary}
    return Audit(rows_of(findings), pairs_of(findings), summary=summary, **acted.tables)


def suspected(question: Question, certain: bool, resources: Resources) -> Suspects | None:
    """Return which rows' targets are probably wrong, from the store where they are there.

    None, with a word in the log, where none can tell.
    """
    model, train = question.final_model, question.train
    if (why := inapplicable(model, train)) is not None:
        log.info("no wrong targets are looked for: %s", why)
        return None

    def key() -> Key:
        return suspects_key(resources.described(model, train), question.protocol, certain)

    def key_of_predictions() -> Key:
        return out_of_sample_key(resources.described(model, train), question.protocol)

    def once(make: Callable[[], OutOfSample]) -> OutOfSample:
        with kept(resources.store, "out_of_sample", key_of_predictions) as folder:
            path = folder / "out_of_sample"
            if not path.exists():
                write_tensors(path, make().tensors())
            return OutOfSample.of_tensors(read_tensors(path))

    with kept(resources.store, "suspects", key) as folder:
        path = folder / "suspects"
        if not path.exists():
            found = suspects(model, train, question.protocol, certain=certain, once=once)
            write_tensors(path, found.tensors())
        return Suspects.of_tensors(read_tensors(path))


def act(acting: Acting, seconds: dict[str, float]) -> Acted:
    """Go through the stages after verification, while there is time."""
    question, settings = acting.findings.question, acting.findings.settings
    found = Acted(cleaned=acting.cleaned(), removed=acting.removed)
    if question.tests and _there_is_time("answers", settings, seconds):
        with _stage("answers", seconds):
            found = replace(found, answers=acting.answers())
    if question.judged and _there_is_time("proof of cleaning", settings, seconds):
        with _stage("proof", seconds):
            found = replace(found, proof=acting.proof())
    if _there_is_time("groups", settings, seconds):
        with _stage("groups", seconds):
            found = replace(found, groups=acting.groups())
    return found


def _there_is_time(name: str, settings: Settings, seconds: dict[str, float]) -> bool:
    if settings.minutes is None or sum(seconds.values()) < 60 * settings.minutes:
        return True
    log.warning("no %s: audit.minutes=%g are over", name, settings.minutes)
    return False


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
    log.info("audit, %s: %.1f s", name, seconds[name])
