from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch

from fimo.errors import InputError
from fimo.evaluation import seeds_for
from fimo.reporting import Results, write_report
from fimo.reporting.explorer import explorer_data
from fimo.reporting.findings import (
    above_ceiling,
    all_warnings,
    further_training_warnings,
    influences,
)
from fimo.reporting.instance_table import collect
from fimo.reporting.interactive import agreement_figure, cost_figure
from fimo.reporting.numbers import ABSENT, MINUS, Unit, duration, number
from tests.reporting.example import example, example_tasks, show_row, show_text

TIMES = "\N{MULTIPLICATION SIGN}"


def page_text(path: Path) -> str:
    """Return the page without the plotly library."""
    html = path.read_text("utf-8")
    start = html.index("<script>")
    return html[:start] + html[html.index("</script>", start) + len("</script>") :]


def page_data(path: Path) -> dict:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S
    )
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(example(), tmp_path_factory.mktemp("report") / "report.html")


def test_the_page_is_one_file_that_asks_nothing_of_a_network(report: Path) -> None:
    text = page_text(report)
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "@import" not in text
    assert "url(" not in text
    assert report.read_text("utf-8").count("plotly.js v") == 1
    assert report.stat().st_mode & 0o444 == 0o444, "others may read it"


def test_the_first_screen_names_the_rows_with_the_largest_and_smallest_effect(report: Path) -> None:
    run = example()
    effect = run.sensitivity.sensitivity[-1].mean(0)
    most, least = (int(run.sensitivity.left_out[i]) for i in (effect.argmax(), effect.argmin()))
    first = page_text(report).partition('<nav class="contents"')[0]
    helpful, harmful = first.split('<div class="side harmful">')
    for index, side in ((most, helpful), (least, harmful)):
        assert re.findall(r'data-find="(.*?)"', side)[0] == f"#{index}"
        assert f'target <span class="told">{100 + index} mg</span>' in side, "in its own units"
        assert f"age {48 + index} · blood pressure" in side


def test_every_measured_row_is_listed_with_each_feature_under_its_name(report: Path) -> None:
    run, table = example(), page_data(report)["runs"][0]["rows"]
    labels = [c["label"] for c in table["columns"]]
    assert {"age", "blood pressure", "sex"} <= {*labels}
    named = {row[0]: row for row in table["rows"]}
    assert named.keys() == {f"#{i}" for i in run.sensitivity.left_out.tolist()}
    effects = run.sensitivity.sensitivity[-1].mean(0).tolist()
    for i, effect in zip(run.sensitivity.left_out.tolist(), effects, strict=True):
        assert named[f"#{i}"][labels.index("effect")][0] == pytest.approx(effect, rel=1e-5)


def test_everything_a_reader_needs_is_there(report: Path) -> None:
    text = page_text(report)
    for said in (
        "further_training.leave_out",  # configuration
        "torch 2.13.0",  # versions
        "the network has 1,000,000 parameters",  # why a method was skipped
        "Inner product of loss gradients.",  # what a method is
        "noise ceiling",
        "186 runs",  # 6 seeds, 30 left out and the full run
        "always predicting the average",
    ):
        assert said in text


def test_figures_hold_the_evaluation_s_numbers(report: Path) -> None:
    run = example()
    figure = page_data(report)["runs"][0]["figures"]["agreement"]["spearman"]
    line = next(t for t in figure["data"] if t.get("name") == "graddot")
    table = run.evaluation
    rows = table[(table.method == "graddot") & (table.metric == "spearman") & (table.seeds == 6)]
    assert plain_numbers(line["y"]) == pytest.approx(rows["mean"].tolist())
    assert any(t.get("name") == "noise ceiling" for t in figure["data"])


def test_each_test_instance_comes_with_its_sensitivities_scores_and_rows(report: Path) -> None:
    run = example()
    explorer = page_data(report)["runs"][0]["explorer"]
    assert [t["index"] for t in explorer["tests"]] == [0, 1, 2, 3, 4]
    chosen = explorer["tests"][3]
    assert chosen["sensitivity"] == pytest.approx(run.sensitivity.sensitivity[-1, 3].tolist(), rel=1e-3)
    assert set(chosen["scores"]) == {"graddot", "datainf", "follows", "random"}
    best = run.sensitivity.left_out[run.sensitivity.sensitivity[-1, 3].argmax()]
    assert chosen["helpful"][0]["index"] == int(best)
    assert explorer["train"][str(int(best))]["target"] == f"{100 + int(best)} mg"


def test_text_of_instances_can_t_become_part_of_the_page(tmp_path: Path) -> None:
    path = write_report(example(show=show_text), tmp_path / "report.html")
    assert "<script>alert" not in page_text(path)
    assert "&lt;script&gt;alert(" in page_text(path)


class Balance(HTMLParser):
    """Checks that elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in {"meta", "link", "img", "br", "input"}:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.mark.parametrize(
    "run",
    [
        example(),
        example(seeds=1),
        example(show=show_text),
        example(config={}, versions={}, dataset={}, final_model={}, descriptions={}, skipped={}),
        example(shown={"train": {}, "test": {}}),
        example(tasks=example_tasks()),
    ],
    ids=["rows", "one seed", "text", "bare", "nothing kept", "tasks"],
)
def test_every_kind_of_run_gives_a_well_formed_page(run: Results, tmp_path: Path) -> None:
    path = write_report(run, tmp_path / "report.html")
    parser = Balance()
    parser.feed(page_text(path))
    assert parser.stack == []
    visible = re.sub(r"<(script|style).*?</\1>", "", page_text(path), flags=re.S)
    assert not re.search(r"\b(nan|None|undefined is|Undefined)\b", visible)


def test_runs_are_overlaid_with_a_tab_for_each(tmp_path: Path) -> None:
    path = write_report([example("sgd"), example("adam", noise=3.0)], tmp_path / "report.html")
    figure = page_data(path)["comparison"]["agreement"]["cosine"]
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["sgd", "adam"], "a panel for each"
    lines = [t for t in figure["data"] if t.get("name") == "graddot"]
    assert [t.get("xaxis") for t in lines] == ["x", "x2"]
    assert [t["showlegend"] for t in lines] == [True, False], "named once"
    assert lines[0]["line"]["color"] == lines[1]["line"]["color"]
    ceilings = [t for t in figure["data"] if t.get("name") == "noise ceiling"]
    assert [t["xaxis"] for t in ceilings] == ["x", "x2"]
    assert page_text(path).count('role="tab"') == 3
    assert path.read_text("utf-8").count("plotly.js v") == 1


def test_a_bad_model_one_seed_and_noise_are_warned_of() -> None:
    bad = example(final_model={"train_loss": 1.0, "test_loss": 1.2, "baseline_loss": 1.02})
    assert any("no better than" in w for w in all_warnings(bad))
    assert any("one seed" in w for w in all_warnings(example(seeds=1)))
    assert any("noisy" in w for w in all_warnings(example(noise=12.0)))
    assert not all_warnings(example())


def test_a_method_above_the_ceiling_is_explained(tmp_path: Path) -> None:
    assert above_ceiling(example()) == []
    run = example(noise=3.0)
    last = run.evaluation["method"] == "follows"
    run = dataclasses.replace(
        run, evaluation=run.evaluation.assign(mean=run.evaluation["mean"].mask(last, 1.0))
    )
    assert above_ceiling(run) == ["follows"]
    assert "above the ceiling" in page_text(write_report(run, tmp_path / "report.html"))


def test_influences_come_with_their_error_over_seeds() -> None:
    run = example()
    helpful, harmful = influences(run, k=4)
    per_seed = run.sensitivity.adjusted[:, -1].double().mean(1)
    i = int(torch.nonzero(run.sensitivity.left_out == helpful[0].index))
    assert helpful[0].effect == pytest.approx(per_seed[:, i].mean().item())
    assert helpful[0].error == pytest.approx(per_seed[:, i].std().item() / 6**0.5)
    assert [row.effect for row in helpful] == sorted((row.effect for row in helpful), reverse=True)
    assert all(row.effect > 0 for row in helpful)
    assert all(row.effect < 0 for row in harmful)


def test_a_folder_gives_the_same_results_back(tmp_path: Path) -> None:
    run = example(retraining=example(seeds=2).sensitivity, tasks=example_tasks())
    run.save(tmp_path, everything=True)
    again = Results.load(tmp_path)
    pd.testing.assert_frame_equal(again.evaluation, run.evaluation)
    pd.testing.assert_frame_equal(again.cost, run.cost)
    assert again.distance is not None
    pd.testing.assert_frame_equal(again.distance, run.distance)
    torch.testing.assert_close(again.sensitivity.raw, run.sensitivity.raw)
    for key in ("name", "final_model", "config", "shown", "skipped", "descriptions", "warnings"):
        assert getattr(again, key) == getattr(run, key), key
    assert list(again.scores) == list(run.scores)
    for name, scores in run.scores.items():
        assert again.scores[name].access == scores.access
        assert again.predicts_raw_changes(name) == run.predicts_raw_changes(name)
    assert again.retraining is not None
    assert list(again.tasks) == ["datamodeling", "removal", "mislabelled"]
    write_report(run, tmp_path / "a.html")
    write_report(again, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()


def test_the_explorer_judges_as_the_evaluation_does() -> None:
    run = example()
    assert run.slopes is not None
    slopes = pd.concat([run.slopes, run.slopes.assign(method="follows")])
    follows = run.scores["follows"]
    follows = dataclasses.replace(follows, values=follows.values + 1.0, predicts_loss_change=True)
    shifted = {**run.scores, "follows": follows}
    changed = dataclasses.replace(run, scores=shifted, slopes=slopes)
    agreements = [explorer_data(r)["tests"][0]["agreement"]["follows"] for r in (run, changed)]
    assert agreements[1] == pytest.approx(agreements[0], abs=0.05)
    assert agreements[1] > 0.8


def test_a_reader_chooses_among_the_test_instances_that_the_run_shows() -> None:
    run = example()
    chosen = run.sensitivity.test.tolist()[1:4]
    fewer = dataclasses.replace(run, shown={**run.shown, "test": {j: run.shown["test"][j] for j in chosen}})
    assert [t["index"] for t in explorer_data(fewer)["tests"]] == chosen
    assert len(collect(run.sensitivity, run.show, tests=2)["test"]) == 2


def test_a_run_without_raw_changes_keeps_its_curves_and_says_nothing_of_single_seeds(tmp_path: Path) -> None:
    run = example()
    run.save(tmp_path, everything=True)
    run.sensitivity.save(tmp_path / "sensitivity.safetensors", with_raw=False)
    again = Results.load(tmp_path)
    assert not again.has_raw
    (tmp_path / "scores" / "random.safetensors").unlink()  # nor is a page lost with one method's scores
    again = Results.load(tmp_path)
    torch.testing.assert_close(again.sensitivity.sensitivity, run.sensitivity.sensitivity)
    text = page_text(write_report(again, tmp_path / "report.html"))
    assert "standard error over 6 seeds, and faded" not in text


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sensitivity\.safetensors is missing"):
        Results.load(tmp_path)


def test_instances_keep_their_kind() -> None:
    assert show_row("train", 3).as_dict()["row"]["sex"] == "female"
    assert "row" not in show_text("train", 3).as_dict()


def test_settings_that_are_no_number_are_written_as_they_are() -> None:
    assert [number(value) for value in ([1, 2], {}, None, True)] == ["[1, 2]", "{}", ABSENT, "True"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ABSENT),
        (float("nan"), ABSENT),
        (3, "3"),
        (-0.25, f"{MINUS}0.25"),
        (1.2345e-5, f"1.234 {TIMES} 10⁻⁵"),
        ("a", "a"),
    ],
)
def test_numbers_are_written_as_people_write_them(value: object, text: str) -> None:
    assert number(value) == text  # type: ignore[arg-type]


def test_small_numbers_of_a_column_share_a_unit() -> None:
    assert Unit.of([2e-4, -3e-5]) == Unit(1e-4, f"{TIMES} 10⁻⁴")
    assert Unit.of([0.5, 20.0]) == Unit(1.0, "")
    assert Unit.of([]) == Unit(1.0, "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0012, "0.0012 s"), (12.4, "12 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def plain_numbers(values: object) -> list[float]:
    """Return numbers that plotly may have packed as base64."""
    if isinstance(values, dict):
        import base64

        import numpy as np

        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).tolist()
    return list(values)  # type: ignore[call-overload]


def following_the_same(**changes: object) -> Results:
    """Return the example with ``follows`` marked as following seeds of the gold standard's own."""
    run = example()
    relation = run.evaluation["method"].map(lambda m: "same" if m == "follows" else "none")
    return dataclasses.replace(run, evaluation=run.evaluation.assign(followed_seeds=relation), **changes)  # type: ignore[arg-type]


def test_a_method_that_followed_the_measurement_s_own_seeds_is_marked_in_page_legend_and_table(
    tmp_path: Path,
) -> None:
    run = following_the_same()
    page = page_text(write_report(run, tmp_path / "report.html"))
    assert "follows: followed the measurement's own seeds" in page
    assert "follows (same seeds)" in page
    for figure in (agreement_figure([run], "cosine"), cost_figure([run], "cosine")):
        names = {t["name"] for t in figure.to_dict()["data"] if t.get("name")}
        assert "follows (same seeds)" in names
        assert "follows" not in names
    assert "own seeds" not in page_text(write_report(example(), tmp_path / "other.html"))


def test_seconds_are_labelled_in_full_on_their_logarithmic_axis() -> None:
    def axis(seconds: float) -> dict:
        run = example()
        cost = run.cost.assign(seconds=run.cost["seconds"].where(run.cost["stage"] != "follows", seconds))
        cost["seconds"] = cost["seconds"].where(cost["stage"] != "random", 0.04)
        figure = cost_figure([dataclasses.replace(run, cost=cost)], "cosine")
        return figure.to_dict()["layout"]["xaxis"]

    assert axis(2.0)["ticktext"] == ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "5"]
    wide = axis(400.0)
    assert (wide["dtick"], wide.get("ticktext")) == (1, None)


def test_the_agreement_is_drawn_above_a_band_from_the_lower_to_the_upper_ceiling() -> None:
    run = example()
    rows = run.evaluation.query("metric == 'cosine' and method == 'follows' and seeds == 6")
    traces = agreement_figure([run], "cosine").data
    upper = next(k for k, t in enumerate(traces) if t.name == "noise ceiling")
    assert traces[upper + 1]["name"] == "lower noise ceiling"
    assert traces[upper + 1]["fill"] == "tonexty", "which is the upper one"
    assert list(traces[upper]["y"]) == rows["ceiling"].tolist()
    assert list(traces[upper + 1]["y"]) == rows["ceiling_lower"].tolist()
    assert (rows["ceiling_lower"] < rows["ceiling"]).all()


def test_too_few_seeds_are_said_once_with_the_number_that_would_do(tmp_path: Path) -> None:
    low = example(noise=20.0)
    page = page_text(write_report(low, tmp_path / "report.html"))
    ceiling = low.evaluation.query("metric == 'cosine' and seeds == 6 and step == 32")["ceiling"].iloc[0]
    assert page.count("not enough seeds") == 1
    assert f"about {seeds_for(ceiling, 6)} would reach 0.9" in page
    noisy = example(noise=5.0)
    ceiling = noisy.evaluation.query("metric == 'cosine' and seeds == 6 and step == 32")["ceiling"].iloc[0]
    assert 0.5 < ceiling < 0.7
    assert any(f"About {seeds_for(ceiling, 6)} seeds" in w for w in further_training_warnings(noisy))


def test_a_run_that_was_written_before_lower_ceilings_were_is_still_shown(tmp_path: Path) -> None:
    example().save(tmp_path, everything=True)
    table = pd.read_csv(tmp_path / "evaluation.csv")
    table.drop(columns=["ceiling_lower", "followed_seeds"]).to_csv(tmp_path / "evaluation.csv", index=False)
    run = Results.load(tmp_path)
    assert set(run.evaluation["followed_seeds"]) == {"unknown"}
    assert "noise ceiling" in page_text(write_report(run, tmp_path / "report.html"))
