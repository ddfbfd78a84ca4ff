"""What a study of several final models answers: which method is best, how surely, what would tell more."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fimo.reporting.answer import Answer, counted, listed, model_facts
from fimo.reporting.findings import all_warnings, at_last_point, same_seeds
from fimo.reporting.measured_rows import DISCOVERY_RATE, measured_rows
from fimo.reporting.models_run import FOLDER, ModelsRun
from fimo.reporting.study_answer import named_rows

SURE = 0.95
"""Probability from which one method is said to beat another."""

SAME = 0.5
"""Probability of methods whose agreement is the same with every final model."""

FEW = 5
"""Final models below which their own error is too uncertain to be trusted."""

PARTS = {
    "part_models": "final models",
    "part_seeds": "seeds of further training",
    "part_tests": "test instances",
}
"""Columns of ``evaluation_variance.csv`` that sum to the variance of the mean agreement."""

MORE = {
    "part_models": "More final models ({models}) would narrow the comparison of methods most.",
    "part_seeds": "More seeds of further training (further_training.seeds={seeds}) would narrow it most.",
    "part_tests": "More test instances (further_training.test) would narrow the error of an agreement most.",
}


def models_answer(run: ModelsRun, rows: pd.DataFrame | None = None) -> Answer:
    """Return the first screen of a study of several final models.

    Args:
        rows: of :func:`~fimo.reporting.measured_rows.measured_rows`, where they are known already.
    """
    combined = run.combined
    rows = measured_rows(combined) if rows is None else rows
    measured = combined.measured
    helpful, harmful = (named_rows(combined, rows, sign * measured.better) for sign in (1, -1))
    return Answer(
        question=f"Which attribution method is best, over {len(run.models)} final models?",
        about=_about(run),
        verdict=[_best(run), _beaten(run), _rows(run, rows)],
        helpful=helpful,
        harmful=harmful,
        effects=f"{measured.mean}, mean over final models",
        helps=f"the {measured.name} {measured.worsens}",
        harms=f"the {measured.name} {measured.improves}",
        others=_variance(run),
        do=_advice(run),
        distrust=_distrust(run),
        files={
            "report.html": "methods over final models, measured rows, each final model",
            "evaluation.csv": "agreement of each method with the measurement, mean over final models",
            "evaluation_pairs.csv": "each two methods: probability that one beats the other",
            "evaluation_variance.csv": "where the variance of an agreement comes from",
            FOLDER: "the study of each final model",
        },
    )


def ranked(run: ModelsRun) -> pd.DataFrame:
    """Return methods by their mean agreement after all further training, best first.

    Columns ``method,mean,sem,lowest,highest,ceiling,ceiling_lower,beats_next,another``: the last two are the
    probabilities that it beats the method of the next line, on average and on one more final model.
    Methods that followed the gold standard's own seeds know part of its noise and come after all others.
    """
    metric = run.combined.metrics[0]
    table = at_last_point(run.combined, metric)
    table = table.sort_values("followed_seeds", key=lambda s: s == "same", kind="stable")
    ends = run.each[run.each["metric"] == metric].groupby("method")["mean"].agg(["min", "max"])
    table = table[["method", "mean", "sem", "ceiling", "ceiling_lower"]].reset_index(drop=True)
    table = table.assign(
        lowest=table["method"].map(ends["min"]),
        highest=table["method"].map(ends["max"]),
    )
    beats = probabilities(run, metric)
    another = probabilities(run, metric, "probability_another")
    following = [*table["method"][1:], None]
    pairs = list(zip(table["method"], following, strict=True))
    unknown = float("nan")
    return table.assign(
        beats_next=[beats.get(pair, unknown) for pair in pairs],
        another=[another.get(pair, unknown) for pair in pairs],
    )


def probabilities(
    run: ModelsRun, metric: str, column: str = "probability"
) -> dict[tuple[str, str | None], float]:
    """Return, by pair of methods, the probability that the first beats the second, at the last point."""
    pairs = run.pairs[(run.pairs["metric"] == metric) & (run.pairs["step"] == run.pairs["step"].max())]
    found: dict[tuple[str, str | None], float] = {}
    for one, other, p in zip(pairs["method"], pairs["other"], pairs[column], strict=True):
        found[one, other], found[other, one] = p, 1 - p
    return found


def parts(run: ModelsRun, metric: str) -> pd.DataFrame:
    """Return the rows of ``evaluation_variance.csv`` at the last point, methods in their ranking's order."""
    table = run.variance[run.variance["metric"] == metric]
    last = table[table["step"] == table["step"].max()].set_index("method")
    ordered: pd.DataFrame = last.reindex([m for m in ranked(run)["method"] if m in last.index])
    return ordered


def between_models(table: pd.DataFrame) -> pd.Series:
    """Return the standard deviation between final models, without the noise of seeds, by method."""
    deviation: pd.Series = (table["part_models"] * table["final_models"]) ** 0.5
    return deviation


def given(run: ModelsRun) -> list[str]:
    """Return the files of final models that were given; none where they were trained."""
    files = (run.combined.config.get("model") or {}).get("checkpoint")
    return list(map(str, files)) if isinstance(files, list) else []


def _about(run: ModelsRun) -> str:
    combined, files = run.combined, given(run)
    made = listed(files) if files else f"trained with seeds {listed(list(map(str, run.models)))}"
    facts = [combined.name, made]
    if combined.dataset.get("train"):
        sizes = f"{combined.dataset['train']:,} training and {combined.dataset.get('test', 0):,} test"
        facts.append(f"{sizes} {combined.noun}s")
    mean = [fact.replace("the model's", "their mean") for fact in model_facts(combined.final_model)]
    return " · ".join([*facts, *mean])


def _best(run: ModelsRun) -> str:
    best, metric = ranked(run).iloc[0], run.combined.metrics[0]
    if best["mean"] != best["mean"]:
        return "No method's agreement with the measurement is known."
    said = (
        f"{best['method']} agrees best with the measured effects: {metric} {best['mean']:.2f} ± "
        f"{best['sem']:.2f} over {len(run.models)} final models, from {best['lowest']:.2f} to "
        f"{best['highest']:.2f}"
    )
    if best["ceiling"] != best["ceiling"]:
        return f"{said}."
    again = best["ceiling_lower"]
    measured = f", and measuring again {again:.2f}" if again == again else ""
    return f"{said}; a perfect method would show {best['ceiling']:.2f}{measured}."


def _beaten(run: ModelsRun) -> str:
    """Return which methods the best one surely beats, and which can't be told from it."""
    order = list(ranked(run)["method"])
    beats = probabilities(run, run.combined.metrics[0])
    chance = {m: beats.get((order[0], m), float("nan")) for m in order[1:]}
    chance = {m: p for m, p in chance.items() if p != SAME}
    if not chance:
        return "There is no other method to compare it with."
    if len(chance) == 1:
        return "".join(f"It beats {m} with a probability of {p:.0%}." for m, p in chance.items())
    rivals = [m for m, p in chance.items() if not p >= SURE]
    others = counted(len(chance), "other method")
    if not rivals:
        return f"It beats each of {others} with probability {SURE:.0%} or more."
    named = [f"{m} ({chance[m]:.0%})" if chance[m] == chance[m] else m for m in rivals]
    return (
        f"It beats {len(chance) - len(rivals)} of {others} with "
        f"probability {SURE:.0%} or more; less surely: {listed(named)}."
    )


def _rows(run: ModelsRun, rows: pd.DataFrame) -> str:
    noun, counts = run.combined.noun, rows["verdict"].value_counts()
    helpful, harmful = (int(counts.get(side, 0)) for side in ("helpful", "harmful"))
    said = f"Of {counted(len(rows), f'measured training {noun}')}, {helpful} help and {harmful} harm"
    return f"{said} on average over such final models (false discovery rate {DISCOVERY_RATE:.0%})."


def _shares(run: ModelsRun) -> tuple[str, pd.Series] | None:
    """Return the best method's name, and the shares of the variance of its mean; None where not known."""
    table = parts(run, run.combined.metrics[0])
    if not len(table):
        return None
    found = table[[*PARTS]].iloc[0].astype(float).fillna(0.0)
    return None if not found.sum() > 0 else (str(table.index[0]), found / found.sum())


def _variance(run: ModelsRun) -> list[str]:
    found = _shares(run)
    if found is None:
        return []
    name, shares = found
    said = [f"{shares[column]:.0%} from {what}" for column, what in PARTS.items()]
    deviation = between_models(parts(run, run.combined.metrics[0])).iloc[0]
    between = f" Between final models its standard deviation is {deviation:.2f}."
    return [f"The variance of {name}'s mean agreement is {', '.join(said[:-1])} and {said[-1]}.{between}"]


def _advice(run: ModelsRun) -> list[str]:
    said: list[str] = []
    if (found := _shares(run)) is not None:
        column = str(found[1].idxmax())
        said.append(MORE[column].format(models=_more(run, 2 * len(run.models)), seeds=2 * run.seeds))
    said.append(f"Each final model's own rows, scores and report are in {FOLDER}.")
    return said


def _more(run: ModelsRun, number: int) -> str:
    """Return how so many final models are asked for."""
    return f"{number} in model.checkpoint" if given(run) else f"model.seeds={number}"


def _distrust(run: ModelsRun) -> Sequence[str]:
    said = list(all_warnings(run.combined))
    if len(run.models) < FEW:
        said.insert(
            0,
            f"{len(run.models)} final models are few: the errors over final models are themselves uncertain "
            f"({_more(run, FEW)} or more).",
        )
    if same := same_seeds([run.combined]):
        said.append(
            f"{listed(same)}: followed the measurement's own seeds, whose noise is known to "
            f"{'them' if len(same) > 1 else 'it'}."
        )
    if run.combined.skipped:
        said.append(f"Not run, or failed: {listed(list(run.combined.skipped))}.")
    return said
