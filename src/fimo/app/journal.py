"""What the stages of a run cost, and what of them failed."""

from __future__ import annotations

import contextlib
import logging
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fimo.app.time_left import TimeLeft
from fimo.cost import Cost, measured, write_costs
from fimo.curvature.solvers import DivergenceError
from fimo.errors import InputError, reason
from fimo.live.log import Log

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass
class Journal:
    """What a run's stages cost and what of them failed, as it goes on.

    Args:
        folder: of the run.
        costs: of the stages that ended.
        skipped: by method or task, why it has no result.
        log: is told of each stage.
        ahead: foretells the stages' time, once they are known.
    """

    folder: Path
    costs: list[Cost] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    ahead: TimeLeft = field(default_factory=TimeLeft)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Cost]:
        """Measure a stage; its cost counts where it ends well."""
        with self.counted(name) as cost:
            yield cost
        self.log.ended(name, cost.seconds)

    @contextlib.contextmanager
    def counted(self, name: str) -> Iterator[Cost]:
        """Measure a stage that makes nothing for the loggers to keep, or that may fail."""
        self.log.stage(name)
        self.ahead.begin(name, self.log)
        with measured(name) as cost:
            yield cost
        self.costs.append(cost)
        self.ahead.ended(cost)

    def tried(
        self, name: str, make: Callable[[Cost], Result], place: tuple[int, int], only: bool = False
    ) -> Result | None:
        """Return a stage's result; None where it failed, which does not take the others with it.

        Args:
            place: the how many-th of how many such stages it is, for the log.
            only: its failure is the run's.

        Raises:
            OSError: a full disk fails everything that follows too.
            InputError: the only one failed.
        """
        try:
            with self.counted(name) as cost:
                found = make(cost)
        except OSError:
            raise
        except Exception as error:  # whatever it is, the others' results are not lost with it
            problem = failure(name, error, self.folder)
            if only:
                raise InputError(f"methods.{name}", problem) from error
            log.error("%s failed: %s", name, problem)
            self.skipped[name] = f"failed: {problem}"
            return None
        log.info("%s: %.1f s (%d of %d)", name, cost.seconds, *place)
        self.log.log({f"method/{name}/seconds": cost.seconds})
        return found

    def end(self) -> float:
        """Write ``cost.csv``; return what a run is worth that ends before it is judged."""
        write_costs(self.costs, self.folder / "cost.csv")
        return math.nan


def failure(name: str, error: Exception, run_dir: Path) -> str:
    """Return a method's failure in one line; its traceback is in ``failures/`` where it needs one."""
    if isinstance(error, InputError | DivergenceError):
        return str(error).splitlines()[0]
    path = run_dir / "failures" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(traceback.format_exception(error)))
    return f"{reason(error)}; the traceback is in {path}"
