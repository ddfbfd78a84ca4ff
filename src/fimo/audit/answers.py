"""Answers to *why this prediction?* as people and programs read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fimo.audit.explained import Shown
from fimo.audit.why import Answer, Step
from fimo.data.display import figures
from fimo.data.origin import Origin


def answer_in_words(answer: Answer, shown: Shown, train: Origin, typical_error: float) -> str:
    """Return an answer as people read it.

    Args:
        train: names of the training rows.
        typical_error: root mean square error of the final model's predictions of all test instances, in the
            target's own units; what a change of a regression is compared with.
    """
    number, last = answer.explained, answer.steps[-1] if answer.steps else None
    if last is None:
        return "no training row is expected to hold this prediction where it is"
    if number.link == "tokens":
        return (
            f"its tokens' mean probability is {number.value:.2f}; {_value(last.without, Shown())} without "
            f"{_rows(last, train)} that support them most: {last.change:+.2g} ± {last.change_sem:.1g}"
        )
    if number.link == "identity":
        parts = [f"predicted {_value(number.value, shown)} (the target is {_value(number.target, shown)})"]
        for side, word in (("lowers", "raise"), ("raises", "lower")):
            of_side = [step for step in answer.steps if step.side == side]
            if of_side:
                step = of_side[-1]
                share = abs(step.change) / typical_error if typical_error else float("nan")
                parts.append(
                    f"without {_rows(step, train)} that {word} it most, {_value(step.without, shown)}: "
                    f"{step.change:+.3g} ± {step.change_sem:.1g}, {share:.0%} of the typical error"
                )
        return "; ".join(parts)
    label = shown.label(number.label)
    head = f"predicted {label} with probability {number.value:.2f}"
    if int(number.target) != number.label:
        head += f" (the label is {shown.label(int(number.target))})"
    if answer.kept <= 0.5:
        return f"{head}; further training on all rows turns it already"
    turned = answer.turned_by
    if turned is None:
        return (
            f"{head}; it stays {label} without {_rows(last, train)} that support it most: probability "
            f"{last.without:.2f} ± {last.change_sem:.1g}"
        )
    return (
        f"{head}; without {_rows(turned, train)} that support it most it is {shown.label(turned.label)} "
        f"(in {turned.turned:.0%} of {answer.seeds} seeds): the probability of {label} falls to "
        f"{turned.without:.2f} ± {turned.change_sem:.1g}"
    )


def _value(value: float, shown: Shown) -> str:
    return f"{figures(value)} {shown.unit}".strip()


def _rows(step: Step, train: Origin) -> str:
    ids = [train.ids[row] for row in step.rows[:5]]
    more = ", …" if len(step.rows) > 5 else ""
    return (
        f"the row {ids[0]}" if len(step.rows) == 1 else f"the {len(step.rows)} rows ({', '.join(ids)}{more})"
    )


def answer_as_json(
    answer: Answer, shown: Shown, train: Origin, test: Origin, typical_error: float
) -> Mapping[str, Any]:
    """Return an answer as ``audit.json`` holds it."""
    number, turned = answer.explained, answer.turned_by
    end = turned or (answer.steps[-1] if answer.steps else None)
    of_classes = number.label >= 0
    return {
        "test_row": int(test.row[number.position]),
        "test_id": test.ids[number.position],
        "target": shown.label(int(number.target)) if of_classes else number.target,
        "prediction": shown.label(number.label) if of_classes else number.value,
        "probability": None if number.link == "identity" else number.value,
        "unit": "probability" if number.link != "identity" else shown.unit,
        "turned_by": None if turned is None else len(turned.rows),
        "prediction_without": None if end is None else shown.label(end.label) if of_classes else end.without,
        "after_full": _number(answer.full),
        "removals": [
            {
                "side": step.side,
                "removed": len(step.rows),
                "ids": [train.ids[row] for row in step.rows],
                "loss_effect": _number(step.loss),
                "loss_effect_sem": _number(step.loss_sem),
                "change": _number(step.change),
                "change_sem": _number(step.change_sem),
                "without": _number(step.without),
                "turned": _number(step.turned),
                "label": shown.label(step.label) if step.label >= 0 else None,
            }
            for step in answer.steps
        ],
        "text": answer_in_words(answer, shown, train, typical_error),
    }


def _number(value: float) -> float | None:
    return value if value == value else None
