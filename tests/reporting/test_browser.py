"""The page in a real browser, headless and offline; skipped where there is none."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from fimo.reporting import AuditRun, write_audit_report, write_models_report, write_report
from tests.reporting.audit_example import example_run
from tests.reporting.example import example, example_tasks, show_text
from tests.reporting.test_models_report import several

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=4000", "--window-size=1200,2000",
)  # fmt: skip

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


def visit(path: Path, script: str) -> tuple[dict, str]:
    """Open a page, run a script that returns something, and return that with what the console said."""
    ending = f"""<script>(() => {{
      const answer = (() => {{ {script} }})();
      const holder = document.createElement("pre");
      holder.id = "answer";
      holder.textContent = JSON.stringify(answer);
      document.body.append(holder);
    }})();</script></body>"""
    page = path.with_name(f"visited-{path.name}")
    page.write_text(path.read_text("utf-8").replace("</body>\n</html>", ending + "</html>"), "utf-8")
    assert BROWSER
    command = [BROWSER, *FLAGS, f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    answer = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.S)
    assert answer, done.stdout[-500:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(answer[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")), console


def test_a_page_that_becomes_narrow_draws_its_figures_anew(tmp_path: Path) -> None:
    answer, console = visit(
        write_report(example(), tmp_path / "report.html"),
        """
        const width = () => Array.from(document.querySelectorAll(".plot-sorted, .plot-scatter"))
          .map((e) => [e._fullLayout.width, e.clientWidth]);
        const before = width();
        document.body.style.width = "400px";
        Object.defineProperty(window, "innerWidth", { value: 400 });
        window.dispatchEvent(new Event("resize"));
        return { before, after: width() };
        """,
    )
    assert console == ""
    assert all(drawn == there > 400 for drawn, there in answer["before"])
    assert all(drawn == there < 400 for drawn, there in answer["after"])
    assert len(answer["after"]) == 2


def test_choosing_a_test_instance_shows_its_rows_and_redraws_its_plots(tmp_path: Path) -> None:
    run = example()
    answer, console = visit(
        write_report(run, tmp_path / "report.html"),
        """
        const state = () => ({
          shown: document.querySelector(".instance-shown").textContent,
          first: document.querySelector(".helpful-rows td.id").textContent,
          bars: Array.from(document.querySelector(".plot-sorted").data[0].y),
          points: document.querySelector(".plot-scatter").data[0].x.length,
        });
        const before = state();
        const pick = document.querySelector(".pick-test");
        pick.value = "3";
        pick.dispatchEvent(new Event("change"));
        return {before, after: state()};
        """,
    )
    assert console == ""
    for j, state in ((0, answer["before"]), (3, answer["after"])):
        sensitivity = run.sensitivity.sensitivity[-1, j]
        assert state["shown"].startswith(f"test instance #{j}")
        assert state["first"] == f"#{int(run.sensitivity.left_out[sensitivity.argmax()])}"
        assert state["bars"] == pytest.approx(sensitivity.sort(descending=True).values.tolist(), rel=1e-3)
        assert state["points"] == 30


def test_every_figure_is_drawn_and_the_measure_of_agreement_can_be_chosen(tmp_path: Path) -> None:
    answer, console = visit(
        write_report(
            example(retraining=example(seeds=2).sensitivity, tasks=example_tasks()), tmp_path / "report.html"
        ),
        """
        const title = () => document.getElementById("plot-0-agreement").layout.yaxis.title.text;
        const before = title();
        document.querySelector('[data-metric="spearman"]').click();
        const drawn = Array.from(document.querySelectorAll(".plot[data-figure]"))
          .filter((e) => !e.closest("figure").hidden)
          .map((e) => [e.dataset.figure, e.querySelectorAll(".trace").length]);
        return {before, after: title(), drawn: Object.fromEntries(drawn)};
        """,
    )
    assert console == ""
    assert (answer["before"], answer["after"]) == ("cosine", "spearman")
    assert set(answer["drawn"]) == {
        "agreement", "seeds", "cost", "mean", "distance", "retraining",
        "datamodeling", "removal", "mislabelled",
    }  # fmt: skip
    assert all(traces > 0 for traces in answer["drawn"].values())


def test_tabs_of_several_runs_are_drawn_when_opened_and_text_stays_text(tmp_path: Path) -> None:
    answer, console = visit(
        write_report([example("one"), example("two", show=show_text)], tmp_path / "report.html"),
        """
        const hidden = document.getElementById("run1").hidden;
        document.querySelector('[data-tab="run1"]').click();
        const run = document.getElementById("run1");
        return {
          hidden,
          opened: !run.hidden,
          traces: run.querySelectorAll("#plot-1-agreement .scatterlayer .trace").length,
          sentence: run.querySelector(".helpful-rows td.sentence").textContent,
        };
        """,
    )
    assert console == "", "neither errors nor alerts"
    assert answer["hidden"]
    assert answer["opened"]
    assert answer["traces"] > 4
    assert answer["sentence"].startswith("<script>alert(")


def test_panels_have_room_on_a_page_and_on_a_phone(tmp_path: Path) -> None:
    answer, console = visit(
        write_report([example(f"run {k}") for k in range(6)], tmp_path / "report.html"),
        """
        const ids = (e) => Object.keys(e._fullLayout).filter((k) => /^yaxis\\d*$/.test(k));
        const panels = () => ["agreement", "by_method"].map((name) => {
          const e = document.getElementById(`plot-comparison-${name}`);
          const { w, h } = e._fullLayout._size;
          return ids(e).map((id) => {
            const x = e._fullLayout[id.replace("y", "x")].domain, y = e._fullLayout[id].domain;
            return [w * x[0], w * x[1], h * y[0], h * y[1]];
          });
        });
        const page = panels();
        document.body.style.width = "400px";
        Object.defineProperty(window, "innerWidth", { value: 400 });
        window.dispatchEvent(new Event("resize"));
        return { page, phone: panels() };
        """,
    )
    assert console == ""
    for figures in (answer["page"], answer["phone"]):
        assert [len(panels) for panels in figures] == [6, 3]
        for panels in figures:
            assert all(right - left > 100 for left, right, _, _ in panels)
            assert all(top - bottom > 150 for _, _, bottom, top in panels)
    for panels in answer["phone"]:
        apart = [bottom - below for (_, _, bottom, _), (_, _, _, below) in itertools.pairwise(panels)]
        assert all(gap > 60 for gap in apart), "ticks and titles between them"


def test_every_figure_and_table_of_several_final_models_is_drawn(tmp_path: Path) -> None:
    answer, console = visit(
        write_models_report(several(), tmp_path / "report.html"),
        """
        document.querySelector('[data-metric="pearson"]').click();
        const drawn = Array.from(document.querySelectorAll(".plot[data-figure]"))
          .filter((e) => !e.closest("figure").hidden)
          .map((e) => [e.dataset.figure, e.querySelectorAll(".trace, .hm, .point").length]);
        const height = (e) => e.querySelector(".main-svg").getBoundingClientRect().height;
        const inside = (e) => height(e) <= e.clientHeight + 1;
        return {
          drawn: Object.fromEntries(drawn),
          inside: Array.from(document.querySelectorAll(".plot.by-row")).map(inside),
          methods: document.querySelectorAll('[data-methods="0"] tbody tr').length,
          rows: document.querySelectorAll('.data[data-run="0"] tbody tr').length,
        };
        """,
    )
    assert console == ""
    assert {"agreement", "each", "beats", "parts", "datamodeling", "removal", "mislabelled"} <= set(
        answer["drawn"]
    )
    assert all(traces > 0 for name, traces in answer["drawn"].items() if name not in ("seeds", "cost"))
    assert answer["inside"] == [True] * 3
    assert answer["methods"] == 2
    assert answer["rows"] == 15


def test_an_audit_s_tables_sort_search_filter_and_download(tmp_path: Path) -> None:
    audit = example_run().audit
    answer, console = visit(
        write_audit_report(example_run(), tmp_path / "report.html"),
        """
        const box = document.querySelector('.data[data-table="rows"]');
        const names = () => Array.from(box.querySelectorAll("tbody td:first-child"), (td) => td.textContent);
        const count = () => box.querySelector(".count").textContent;
        const heads = Array.from(box.querySelectorAll(".sorter"));
        const head = (label) => heads.find((b) => b.textContent.startsWith(label));
        const first = names();
        head("predicted effect").click();
        const falling = names();
        head("predicted effect").click();
        const rising = names();
        const choose = box.querySelector(".tools select");
        choose.value = "harmful";
        choose.dispatchEvent(new Event("change"));
        const harmful = count();
        const csv = [];
        const made = URL.createObjectURL;
        URL.createObjectURL = (blob) => { csv.push(blob.size); return made.call(URL, blob); };
        box.querySelector(".tools button").click();
        choose.value = "";
        choose.dispatchEvent(new Event("change"));
        document.querySelector(".find").click();
        return {first, falling, rising, harmful, csv, found: names(), after: count()};
        """,
    )
    assert console == ""
    by_score = audit.rows.sort_values("score")["id"].tolist()
    assert answer["rising"] == by_score[:15]
    assert answer["falling"] == by_score[::-1][:15]
    harmful = audit.rows[audit.rows["verdict"] == "harmful"]
    assert answer["harmful"] == f"{len(harmful)} of 300"
    assert answer["csv"][0] > 40 * len(harmful)
    largest = audit.rows[audit.rows["verdict"] == "helpful"].sort_values("effect")["id"].iloc[-1]
    assert answer["found"] == [largest], "a name of the first screen leads to its line"
    assert answer["after"] == "1 of 300"


def test_an_audit_explains_the_test_instance_that_is_chosen(tmp_path: Path) -> None:
    pairs = example_run().audit.pairs
    answer, console = visit(
        write_audit_report(example_run(), tmp_path / "report.html"),
        """
        const why = document.querySelector(".why");
        const state = () => ({
          shown: why.querySelector(".instance-shown b").textContent,
          first: Array.from(why.querySelectorAll(".data")).at(-1).querySelector("td.id").textContent,
        });
        const before = state();
        const pick = why.querySelector("select");
        pick.value = "1";
        pick.dispatchEvent(new Event("change"));
        return {before, after: state()};
        """,
    )
    assert console == ""
    for state, row in ((answer["before"], 3), (answer["after"], 17)):
        of_test = pairs[(pairs["test_row"] == row) & pairs["effect"].notna()]
        largest = of_test.loc[of_test["effect"].abs().idxmax(), "id"]
        assert state == {"shown": f"H{row:05d}", "first": largest}


def test_a_link_of_the_contents_opens_the_folded_section_and_draws_it(tmp_path: Path) -> None:
    answer, console = visit(
        write_report(example(), tmp_path / "report.html"),
        """
        const section = document.getElementById("run0-methods");
        const before = section.open;
        document.querySelector('a[href="#run0-methods"]').click();
        dispatchEvent(new Event("hashchange"));
        return {before, after: section.open};
        """,
    )
    assert console == ""
    assert (answer["before"], answer["after"]) == (False, True)


def test_values_of_the_user_s_own_table_are_shown_unrounded(tmp_path: Path) -> None:
    audit = example_run().audit
    frame = pd.DataFrame({"price": [264500.25 + k for k in range(400)]})
    answer, console = visit(
        write_audit_report(AuditRun.of_frames(audit, frame), tmp_path / "report.html"),
        """
        const row = document.querySelector('.data[data-table="rows"] tbody tr');
        return [row.firstChild.textContent, row.lastChild.textContent];
        """,
    )
    assert console == ""
    shown = audit.rows.set_index("id").loc[answer[0]]
    assert float(answer[1]) == pytest.approx(264500.25 + shown["row"], abs=0.06)
