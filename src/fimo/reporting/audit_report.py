"""The page of an audit: one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fimo.audit.result import Audit
from fimo.reporting.answer import counted, listed, sentence
from fimo.reporting.audit_answer import SIDES, audit_answer, effects_by_class, row_name
from fimo.reporting.audit_run import EVERY_ROW, LEADING_SUSPECTS, AuditRun, train_rows
from fimo.reporting.flat import flat
from fimo.reporting.html_page import write_page
from fimo.reporting.instance_lines import folded
from fimo.reporting.numbers import number
from fimo.reporting.results import plain
from fimo.reporting.tables import Column, content, effects, instance_columns, table

MOST_PAIRS = 100
"""Rows listed for each named test instance."""

MOST_MEMBERS = 12
"""Of a group that are named."""

PROVEN = ("removed", "rows", "mean", "sem", "change", "change_sem", "seeds")
SUSPECT = "false discovery rate of the suspects up to this row"


def write_audit_report(audit: Audit | AuditRun, path: str | Path) -> Path:
    """Write one self-contained page about an audit; it asks nothing of a network.

    Returns:
        its path.
    """
    run = AuditRun(audit) if isinstance(audit, Audit) else audit
    answer = audit_answer(run)
    rows = listed_rows(run)
    classes = effects_by_class(run)
    groups, found = run.audit.groups, run.audit.suspects
    sure = len(found)
    found = found if sure else run.audit.looked_at.head(LEADING_SUSPECTS)
    summary = run.audit.summary
    tables = {
        "rows": rows_table(run, rows),
        "suspects": suspects_table(run, found) if len(found) else None,
        "groups": groups_table(groups) if len(groups) else None,
    }
    figures = {"tests": tests(run), "calibration": calibration(run), "proof": proof(run)}
    return write_page(
        "audit.html",
        Path(path),
        {"tables": tables, **figures},
        title=f"fimo: {run.name}" if run.name else "fimo: audit",
        answer=answer,
        run=run,
        noun=run.noun,
        measured=run.audit.measured,
        n=len(run.audit.rows),
        listed=len(rows),
        suspected=sure,
        follows=str(classes) if classes is not None and classes.follow else "",
        stages=list((summary.get("stages") or {}).items()),
        protocol=summary.get("protocol", ""),
        summary=summary,
        config=flat(run.config),
        sections={key: bool(value) for key, value in {**tables, **figures}.items()},
    )


def listed_rows(run: AuditRun) -> pd.DataFrame:
    """Return the rows that the page lists: all, or those that were measured, lead, or are suspect."""
    rows = run.audit.rows
    return rows if len(rows) <= EVERY_ROW else rows[rows["row"].isin(train_rows(run.audit))]


def rows_table(run: AuditRun, rows: pd.DataFrame) -> dict[str, Any]:
    """Return the table of training rows, the surest first."""
    order = rows.assign(
        rank=rows["verdict"].map({"helpful": 0, "harmful": 0, "unclear": 1}).fillna(2),
        size=rows["effect"].fillna(rows["score"]).abs(),
    ).sort_values(["rank", "size"], ascending=[True, False], kind="stable")
    displays = [run.show("train", int(row)) for row in order["row"]]
    classes = effects_by_class(run)
    within: Sequence[Any] = [None] * len(order)
    values, effect = _values(run, displays), _effect(run)
    if classes is not None and classes.follow:
        # of predictions alone: measured effects of some rows would not be on the scale of the others' scores
        better = run.audit.measured.better
        inside = classes.within(better * order["score"].to_numpy(float), [str(t) for t in order["target"]])
        within = effects(better * inside, order["score_sem"])
    columns = [
        Column(run.noun, "name", _names(order), "its identifier, or its row in the file"),
        Column("measured effect", "effect", effects(order["effect"], order["effect_sem"]), effect),
        Column(
            "predicted effect", "effect", effects(order["score"], order["score_sem"]), f"screen: {effect}"
        ),
        Column("within its class", "effect", within, "predicted effect minus the mean of its class"),
        Column("verdict", "verdict", list(order["verdict"])),
        Column("q", "q", list(order["q"]), "smallest false discovery rate at which the verdict holds"),
        Column("target", "text", list(order["target"])),
        Column("model says", "text", [d.prediction if d else None for d in displays]),
        *values[:1],
        Column("own loss", "number", list(order["own_loss"]), "of the final model on the row itself"),
        Column("effect on itself", "number", list(order["self_effect"]), _itself(run)),
        Column("suspect", "q", list(order["suspect_q"]), SUSPECT),
        Column("suggested", "text", list(order["suggested"]), "what the model would say instead"),
        *values[1:],
    ]
    return table(columns, "rows_listed.csv", shown=15)


def suspects_table(run: AuditRun, found: pd.DataFrame) -> dict[str, Any]:
    """Return the table of rows whose target may be wrong, the surest first."""
    displays = [run.show("train", int(row)) for row in found["row"]]
    columns = [
        Column(run.noun, "name", _names(found)),
        Column("given", "text", list(found["target"]), "its target"),
        Column("suggested", "text", list(found["suggested"]), "what the model would say"),
        Column("false discovery rate", "q", list(found["suspect_q"]), SUSPECT),
        Column("own loss", "number", list(found["own_loss"]), "of the final model on the row itself"),
        Column("effect on itself", "number", list(found["self_effect"]), _itself(run)),
        Column("effect on tests", "effect", effects(found["effect"], found["effect_sem"]), _effect(run)),
        *_values(run, displays),
    ]
    return table(columns, "suspects.csv", shown=10)


def groups_table(groups: pd.DataFrame) -> dict[str, Any]:
    """Return the table of groups."""
    measured, missing = effects(groups["effect"], groups["effect_sem"]), [float("nan")] * len(groups)
    columns = [
        Column("group", "name", list(groups["group"])),
        Column("kind", "text", list(groups["kind"])),
        Column("rows", "number", list(groups["size"])),
        Column("measured effect", "effect", measured, "of removing all of them"),
        Column(
            "predicted", "effect", effects(groups["score"], missing), "the sum of their predicted effects"
        ),
        Column(
            "beyond random rows",
            "effect",
            effects(groups["beyond_random"], groups["beyond_random_sem"]),
            "the measured effect minus that of as many random rows, by which verdicts are made",
        ),
        Column("verdict", "verdict", list(groups["verdict"])),
        Column("what they share", "text", list(groups["shared"])),
        Column("members", "text", [listed(str(ids).split(), MOST_MEMBERS) for ids in groups["ids"]]),
    ]
    return table(columns, "groups_listed.csv", shown=10)


def _effect(run: AuditRun) -> str:
    measured = run.audit.measured
    positive = f"positive: it {measured.positive}"
    return f"change of the {measured.mean} when it is removed, ± standard error; {positive}"


def _itself(run: AuditRun) -> str:
    return f"change of the row's own {run.audit.measured.name} when it is removed"


def tests(run: AuditRun) -> list[dict[str, Any]]:
    """Return the named test instances, each with its rows: measured ones, then by predicted effect."""
    answers = {int(a["test_row"]): a for a in run.audit.summary.get("answers", []) if "test_row" in a}
    found = []
    for test_row, pairs in run.audit.pairs.groupby("test_row", sort=False):
        row = int(str(test_row))
        display, answer = run.show("test", row), answers.get(row, {})
        identifier = str(pairs["test_id"].iloc[0])
        found.append(
            {
                "name": f"row {identifier}" if identifier == str(row) else identifier,
                "text": sentence(str(answer["text"])) if answer.get("text") else "",
                "removals": removals_table(answer, run.audit.measured.name)
                if answer.get("removals")
                else None,
                "facts": plain(_facts(display, answer)),
                "instance": content(display),
                "table": pairs_table(run, pairs, str(answer.get("unit", "")), identifier),
            }
        )
    return found


def removals_table(answer: Mapping[str, Any], measured: str = "loss") -> dict[str, Any]:
    """Return the table of what becomes of a prediction without its foremost rows together.

    Args:
        measured: of test instances, beside it.
    """
    steps: list[Mapping[str, Any]] = answer["removals"]
    unit = answer.get("unit")
    missing = float("nan")
    moved, loss = (
        effects(
            [missing if step.get(c) is None else step[c] for step in steps],
            [missing if step.get(f"{c}_sem") is None else step[f"{c}_sem"] for step in steps],
        )
        for c in ("change", "loss_effect")
    )
    columns = [
        Column("without", "name", [counted(int(step["removed"]), "row") for step in steps]),
        Column("that", "text", [SIDES.get(str(step["side"]), str(step["side"])) for step in steps]),
        Column(f"the prediction moves by{f' ({unit})' if unit else ''}", "effect", moved),
        Column("and is", "number", [step["without"] for step in steps]),
        Column("class", "text", [step.get("label") for step in steps]),
        Column("turned", "number", [step.get("turned") for step in steps], "share of seeds"),
        Column(f"effect on its {measured}", "effect", loss),
        Column("rows", "text", [listed(step["ids"], MOST_MEMBERS) for step in steps]),
    ]
    return table(columns, f"removals_{answer['test_id']}.csv", shown=12)


def _facts(display: Any, answer: Mapping[str, Any]) -> dict[str, Any]:
    unit = f" {answer['unit']}" if answer.get("unit") not in (None, "", "probability") else ""
    facts: dict[str, Any] = {}
    for label, key in (("target", "target"), ("model says", "prediction")):
        if answer.get(key) is not None:
            facts[label] = f"{number(answer[key])}{unit}"
        elif display is not None and getattr(display, key) is not None:
            facts[label] = getattr(display, key)
    if answer.get("probability") is not None:
        facts["its probability"] = answer["probability"]
    if display is not None and display.row:
        facts |= folded(display.row)
    return facts


def pairs_table(run: AuditRun, pairs: pd.DataFrame, unit: str, test: str) -> dict[str, Any]:
    """Return the table of training rows behind one prediction."""
    order = pairs.assign(measured=pairs["effect"].notna(), size=pairs["effect"].fillna(pairs["score"]).abs())
    order = order.sort_values(["measured", "size"], ascending=False, kind="stable").head(MOST_PAIRS)
    displays = [run.show("train", int(row)) for row in order["row"]]
    loss = effects(order["effect"], order["effect_sem"])
    moved = effects(order["prediction_effect"], order["prediction_effect_sem"])
    name = run.audit.measured.name
    label = f"moves the prediction by{f' ({unit})' if unit else ''}"
    columns = [
        Column(run.noun, "name", _names(order)),
        Column(f"effect on its {name}", "effect", loss, f"change of this {name} when the row is removed"),
        Column(label, "effect", moved, "change of the prediction when the row is removed"),
        Column("predicted effect", "effect", effects(order["score"], order["score_sem"]), "by the screen"),
        Column("verdict", "verdict", list(order["verdict"])),
        Column("target", "text", list(order["target"])),
        *_values(run, displays),
    ]
    return table(columns, f"pairs_{test}.csv", shown=10)


def _names(rows: pd.DataFrame) -> list[str]:
    return [row_name(row) for row in rows.itertuples()]


def _values(run: AuditRun, displays: Sequence[Any]) -> list[Column]:
    return instance_columns(displays) if any(d is not None for d in displays) else []


def calibration(run: AuditRun) -> dict[str, Any] | None:
    """Return predicted and measured effects of the verified rows, for a scatter plot; None without any."""
    rows = run.audit.rows[run.audit.rows["effect"].notna()]
    if not len(rows):
        return None
    columns = ["score", "score_sem", "effect", "effect_sem"]
    return {
        "name": _names(rows),
        "verdict": list(rows["verdict"]),
        **plain({c: rows[c].tolist() for c in columns}),
    }


def proof(run: AuditRun) -> list[dict[str, Any]]:
    """Return, by metric, what further training without some rows gives: changes where they are known."""
    return [
        {
            "metric": str(metric),
            **plain({c: t[c].tolist() for c in PROVEN if c in t}),
        }
        for metric, t in run.audit.proof.groupby("metric", sort=False)
    ]
