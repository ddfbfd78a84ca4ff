"""How long a run will still take, over all its stages, by what such stages took here before."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fimo.cost import Cost
from fimo.engine.pace import about
from fimo.live.log import Log
from fimo.store.files import written_aside

log = logging.getLogger(__name__)

FILE = "durations.jsonl"
"""In the store: a line for each stage that was computed there, not read."""

MOST_LINES = 4000
"""Lines beyond which the older half is dropped."""

MOST_RATIO = 30.0
"""Between two stages' work beyond which one's seconds say nothing of the other's."""

EVERY_SECONDS = 10.0
"""At least so long between two lines of time left."""

LEAST_SECONDS = 5.0
"""Less than this is not worth a line."""


@dataclass(frozen=True)
class Duration:
    """What a stage took: ``seconds`` for so much ``work``, in a unit of the stage's own."""

    seconds: float
    work: float


class TimeLeft:
    """Says how long the stages that remain will take.

    A stage's seconds are taken to be in proportion to its work, a count of operations up to a factor that is
    the stage's own (a method's, say), from the run before whose work was nearest, on the same device with as
    many threads. Of a stage that was never timed there nothing is known, which is said.

    Args:
        store: whose file of durations is read, and added to; None: nothing is said.
        works: of all stages, by name, in their order.
        device: of the computations.
    """

    def __init__(
        self, store: Path | None = None, works: Mapping[str, float] | None = None, device: str = "cpu"
    ) -> None:
        self.path = None if store is None else store / FILE
        self.works = dict(works or {})
        self.place = {"device": device, "threads": torch.get_num_threads()}
        self._known = self._read()
        self._said = -math.inf

    def begin(self, name: str, live: Log) -> None:
        """Say at a stage's beginning how long it and all that follow will take; tell the loggers, too."""
        if name not in self.works:
            return
        names = list(self.works)
        rest = names[names.index(name) :]
        live.later = self._seconds(rest[1:])[0]
        seconds, unknown = self._seconds(rest)
        if not unknown:
            live.log({"time_left": seconds})
        now = time.monotonic()
        # once it is worth a line that nothing is known, of more than one stage
        first = bool(unknown) and name == names[0] and len(names) > 1
        if now - self._said < EVERY_SECONDS or (seconds < LEAST_SECONDS and not first):
            return
        self._said = now
        place = f"stage {len(names) - len(rest) + 1} of {len(names)}, {name}"
        log.info("%s: %s", place, _in_words(seconds, unknown, len(rest)))

    def ended(self, cost: Cost) -> None:
        """Keep what a stage took, unless its result, or a part of it, was there already."""
        # full runs that another method has made are charged for, and took no time
        seconds = cost.seconds - cost.reused_seconds
        was_there = cost.reused > 0 and not cost.reused_seconds
        if self.path is None or cost.stage not in self.works or was_there or seconds <= 0:
            return
        line = {"stage": cost.stage, **self.place, "work": self.works[cost.stage], "seconds": seconds}
        with contextlib.suppress(OSError):  # a run does not end for want of a guess at the next one's time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def expected(self, name: str) -> float | None:
        """Return the seconds that a stage will take; None where nothing like it was timed here."""
        found, work = self._known.get(name, []), self.works[name]
        near = min(found, key=lambda one: abs(math.log(one.work / work)), default=None)
        if near is None or abs(math.log(near.work / work)) > math.log(MOST_RATIO):
            return None
        return near.seconds * work / near.work

    def _seconds(self, names: list[str]) -> tuple[float, list[str]]:
        """Return the seconds of those stages of which they are known, and the others' names."""
        each = {name: self.expected(name) for name in names}
        return sum(s for s in each.values() if s is not None), [n for n, s in each.items() if s is None]

    def _read(self) -> dict[str, list[Duration]]:
        """Return durations by stage, the latest first."""
        known: dict[str, list[Duration]] = {}
        for line in reversed(list(self._lines())):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line of a killed run, say
                one: dict[str, Any] = json.loads(line)
                duration = Duration(float(one["seconds"]), float(one["work"]))
                if duration.work > 0 and all(one[key] == value for key, value in self.place.items()):
                    known.setdefault(str(one["stage"]), []).append(duration)
        return known

    def _lines(self) -> Iterator[str]:
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            lines = self.path.read_text().splitlines()
            if len(lines) > MOST_LINES:
                lines = lines[-MOST_LINES // 2 :]
                with written_aside(self.path) as aside:
                    aside.write_text("".join(f"{line}\n" for line in lines))
            yield from lines


def _in_words(seconds: float, unknown: list[str], count: int) -> str:
    if len(unknown) == count:
        return "how long it all takes is not known, none of it was timed here before"
    left = f"{about(seconds)} left in all"
    if not unknown:
        return left
    some = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
    return f"{left}, besides {some}, not timed here before"
