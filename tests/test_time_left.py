import json
import logging

import pytest

from fimo.app.time_left import FILE, MOST_LINES, TimeLeft
from fimo.cost import Cost
from fimo.live.log import Log

WORKS = {"final_model": 100.0, "further_training": 1000.0, "graddot": 10.0}


def kept(store, **seconds):
    """Write a store's durations: seconds by stage, for the works above."""
    before = TimeLeft(store, WORKS)
    for stage, value in seconds.items():
        before.ended(Cost(stage, value))


def said(caplog, store, stage, works=WORKS):
    caplog.clear()
    live = Log()
    with caplog.at_level(logging.INFO, logger="fimo.app.time_left"):
        TimeLeft(store, works).begin(stage, live)
    return caplog.messages, live


def test_the_rest_of_a_run_is_foretold_in_proportion_to_its_work(tmp_path, caplog):
    kept(tmp_path, final_model=10, further_training=100, graddot=2)
    double = {name: 2 * work for name, work in WORKS.items()}
    messages, live = said(caplog, tmp_path, "final_model", double)
    assert messages == ["stage 1 of 3, final_model: about 3.7 min left in all"]  # 2 * 112 s
    assert live.later == pytest.approx(204)
    messages, _ = said(caplog, tmp_path, "further_training", double)
    assert messages == ["stage 2 of 3, further_training: about 3.4 min left in all"]


def test_what_was_never_timed_is_named(tmp_path, caplog):
    assert said(caplog, tmp_path, "final_model")[0] == [
        "stage 1 of 3, final_model: how long it all takes is not known, none of it was timed here before"
    ]
    assert said(caplog, tmp_path, "audit", {"audit": 1.0})[0] == []  # a single stage says so by itself
    kept(tmp_path, final_model=10, further_training=100)
    assert said(caplog, tmp_path, "final_model")[0] == [
        "stage 1 of 3, final_model: about 110 s left in all, besides graddot, not timed here before"
    ]
    # a hundred times the work says nothing
    assert TimeLeft(tmp_path, {"final_model": 10_000.0}).expected("final_model") is None


def test_the_nearest_work_on_the_same_device_counts_the_latest_first(tmp_path):
    kept(tmp_path, final_model=10)
    kept(tmp_path, final_model=20)
    TimeLeft(tmp_path, {"final_model": 1000.0}).ended(Cost("final_model", 1))
    TimeLeft(tmp_path, WORKS, "cuda").ended(Cost("final_model", 0.1))
    now = TimeLeft(tmp_path, WORKS)
    assert now.expected("final_model") == 20
    assert TimeLeft(tmp_path, {"final_model": 900.0}).expected("final_model") == pytest.approx(0.9)


def test_results_that_were_there_are_not_durations(tmp_path):
    kept(tmp_path, final_model=10)
    before = (tmp_path / FILE).read_text()
    TimeLeft(tmp_path, WORKS).ended(Cost("final_model", 5, reused=1.0))
    TimeLeft(tmp_path, WORKS).ended(Cost("another", 5))
    assert (tmp_path / FILE).read_text() == before
    cost = Cost("graddot", 1)
    cost.reuse(7)  # full runs that another method had made
    TimeLeft(tmp_path, WORKS).ended(cost)
    assert json.loads((tmp_path / FILE).read_text().splitlines()[-1])["seconds"] == 1


def test_the_file_stays_small_and_half_a_line_does_no_harm(tmp_path):
    kept(tmp_path, final_model=10)
    line = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(MOST_LINES * line + '{"stage": "final_')
    assert TimeLeft(tmp_path, WORKS).expected("final_model") == 10
    assert len((tmp_path / FILE).read_text().splitlines()) == MOST_LINES // 2
