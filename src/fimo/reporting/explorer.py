"""What the report's page needs to let a reader choose a test instance: plain numbers, a bounded number."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fimo.evaluation.metrics import agreement
from fimo.reporting.findings import influences, scored_methods
from fimo.reporting.instance_lines import folded
from fimo.reporting.instance_table import InstanceDisplay, chosen_tests
from fimo.reporting.results import Results

MOST_NUMBERS = 400_000
"""Sensitivities and scores embedded in a page, about 8 bytes each."""


def explorer_data(run: Results, per_test: int = 5) -> dict[str, Any]:
    """Return the last evaluation point's sensitivities and scores of the test instances to choose from.

    Keys: ``left_out [L]``; ``names [L]``; ``tests``, each with ``index``, ``name``, ``display``,
    ``sensitivity [L]``, ``scores`` by method ``[L]`` (and ``errors`` where it has them), ``agreement`` by
    method, ``helpful`` and ``harmful`` (``index, name, effect, error, seeds_agreeing``); ``train``: displays
    by index; ``methods``, best first; ``measured`` and ``better``, what sensitivities are changes of.
    """
    methods = scored_methods(run)
    measured = len(run.sensitivity.left_out)
    shown_tests = run.shown.get("test", {})
    wanted = [k for k, j in enumerate(run.sensitivity.test.tolist()) if j in shown_tests]
    wanted = wanted or chosen_tests(run.sensitivity)
    most = max(1, min(len(wanted), MOST_NUMBERS // ((len(methods) + 1) * measured)))
    wanted = [wanted[k * len(wanted) // most] for k in range(most)]
    last = run.sensitivity.sensitivity[-1]
    judged = {m: run.judged_scores(m) for m in methods}
    scores = {m: s[-1] if s.ndim == 3 else s for m, s in judged.items()}
    known = {m: bars for m in methods if (bars := run.errors(m)) is not None}
    errors = {m: bars[-1] if bars.ndim == 3 else bars for m, bars in known.items()}
    metric = run.metrics[0]
    values = {m: agreement(s, last[None], metric)[0] for m, s in scores.items()}  # type: ignore[arg-type]
    tests: list[dict[str, Any]] = []
    mentioned: set[int] = set()
    for j in wanted:
        helpful, harmful = influences(run, j, per_test)
        mentioned.update(row.index for row in [*helpful, *harmful])
        index = int(run.sensitivity.test[j])
        display = run.show("test", index)
        tests.append(
            {
                "index": index,
                "name": run.called("test", index),
                "display": as_shown(display),
                "sensitivity": rounded(last[j]),
                "scores": {m: rounded(s[j]) for m, s in scores.items()},
                "errors": {m: rounded(bars[j]) for m, bars in errors.items()},
                "agreement": {m: round(v[j].item(), 3) for m, v in values.items()},
                "helpful": [{**vars(row), "name": run.called("train", row.index)} for row in helpful],
                "harmful": [{**vars(row), "name": run.called("train", row.index)} for row in harmful],
            }
        )
    shown = {i: as_shown(d) for i, d in run.shown.get("train", {}).items() if i in mentioned}
    left_out = run.sensitivity.left_out.tolist()
    return {
        "left_out": left_out,
        "names": [run.called("train", i) for i in left_out],
        "tests": tests,
        "train": shown,
        "methods": methods,
        "metric": metric,
        "measured": run.measured.name,
        "better": run.measured.better,
    }


def as_shown(display: InstanceDisplay | None) -> dict[str, Any] | None:
    """Return an instance for the page's script, one-hot columns put together."""
    if display is None:
        return None
    return display.as_dict() | ({"row": folded(display.row)} if display.row else {})


def rounded(values: Tensor, digits: int = 4) -> list[float]:
    """Return values with few significant digits, so that a page stays small."""
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
