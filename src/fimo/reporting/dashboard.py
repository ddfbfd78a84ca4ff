"""A ready W&B dashboard, defined by code: ``python -m fimo.reporting.dashboard --entity TEAM RUN_DIR…``.

A dozen panels are open, the rest is in closed sections; runs are sorted by their best agreement, with the
columns that a sweep is judged by. Needs ``pip install 'fimo[dashboard]'``, and a login to save; ``--print``
shows the definition without one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fimo.errors import InputError
from fimo.evaluation.metrics import DEFAULT
from fimo.live.agreement import STEP

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

    from fimo.reporting.results import Results

PROGRESS = "further_training/replica_steps"

BENCHMARK = "results.csv"
"""What tells the benchmark's folder from a run's."""


def dashboard(
    entity: str,
    project: str,
    methods: Sequence[str],
    metrics: Sequence[str],
    tasks: Sequence[str] = (),
    name: str = "fimo",
    audit: bool = False,
) -> Workspace:
    """Return a workspace that overlays runs: what they agree on, what they cost, their instances.

    Args:
        entity: user or team.
        methods: whose agreement is drawn; of several runs, all.
        metrics: the first is drawn in an open section, the others in a closed one.
        tasks: further evaluations with one summary value for each method, as ``datamodeling``.
        audit: some runs are audits, whose rows are shown.

    Raises:
        InputError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as spaces
        from wandb_workspaces.expr import Ordering, Summary
    except ImportError as error:
        raise InputError("wandb-workspaces", "not installed; pip install 'fimo[dashboard]'") from error

    def line(title: str, x: str, *keys: str, **settings: Any) -> panels.LinePlot:
        return panels.LinePlot(title=title, x=x, y=list(keys), **settings)

    def agreement(metric: str) -> panels.LinePlot:
        keys = [f"agreement/{method}/{metric}" for method in methods]
        title = f"{metric} with further training, and the noise ceiling"
        return line(title, STEP, *keys, f"ceiling/{metric}", title_x="optimizer steps", max_runs_to_show=10)

    def bars(title: str, keys: Sequence[str]) -> panels.BarPlot:
        return panels.BarPlot(title=title, metrics=list(keys))

    def picture(title: str, key: str) -> panels.MediaBrowser:
        return panels.MediaBrowser(title=title, media_keys=[key])

    def table(name: str) -> panels.WeavePanelSummaryTable:
        return panels.WeavePanelSummaryTable(table_name=name)

    open_panels: list[Any] = []
    closed: list[Any] = []
    if methods:
        first = metrics[0]
        open_panels = [
            agreement(first),
            picture(f"{first} and the number of seeds", f"figures/seeds/{first}"),
            picture(f"{first} and cost", f"figures/cost/{first}"),
            bars(f"{first} after all further training", [f"last/{m}/{first}" for m in methods]),
            table("methods"),
            table("instances"),
        ]
        spread = panels.ScatterPlot(
            title=f"best {first} and the seconds of further training",
            x=panels.SummaryMetric("cost/further_training/seconds"),
            y=panels.SummaryMetric(f"best/{first}"),
        )
        closed = [
            spaces.Section("Other metrics", [agreement(m) for m in metrics[1:]], is_open=False),
            spaces.Section(
                "Sweep and further evaluations",
                [spread, *(bars(task, [f"{task}/{m}" for m in methods]) for task in tasks)],
                is_open=False,
            ),
        ]
    if audit:
        open_panels += [table("rows"), table("pairs")]
    open_panels += [
        picture("report", "report"),
        line("final model: losses", "final_model/epoch", "final_model/train_loss", "final_model/val_loss"),
        line("further training: test loss of the full runs", STEP, "further_training/test_loss"),
        line("noise ceiling by seeds", "further_training/seeds", "further_training/ceiling"),
    ]
    progress = [
        line("replica-steps per second", PROGRESS, "further_training/per_second"),
        line("seconds left", PROGRESS, "further_training/time_left"),
        line("spread over seeds", STEP, "further_training/test_loss_sd"),
        line("distance from the final model", STEP, "further_training/distance"),
        line("accuracy of the final model", "final_model/epoch", "final_model/val_accuracy"),
    ]
    sections = [
        spaces.Section("Overview", open_panels, is_open=True),
        *closed,
        spaces.Section("Progress", progress, is_open=False),
        spaces.Section("What differs between runs", [panels.RunComparer(diff_only="split")], is_open=False),
    ]
    order, columns = [], ["summary:state", "summary:cost/further_training/seconds"]
    if methods:
        order = [Ordering(Summary(f"best/{metrics[0]}"), ascending=False)]
        best = [f"{key}/{metrics[0]}" for key in ("best", "best_method", "last_ceiling")]
        columns = ["summary:state", *(f"summary:{key}" for key in best), columns[-1]]
    return spaces.Workspace(
        entity,
        project,
        name=name,
        sections=sections,
        settings=spaces.WorkspaceSettings(x_axis=STEP, max_runs=50),
        runset_settings=spaces.RunsetSettings(order=order, pinned_columns=columns),
    )


def one_value(run: Results, task: str) -> bool:
    """Whether a task's table comes down to one number for each method, which W&B's summary holds."""
    curve = run.curve(task)
    return curve is None or curve.x == "epoch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fimo.reporting.dashboard", description=__doc__)
    parser.add_argument("run_dir", nargs="+", help="folders of runs or of the benchmark")
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="fimo")
    parser.add_argument("--name", default="fimo", help="of the dashboard")
    parser.add_argument("--print", action="store_true", help="show the definition as JSON, save nothing")
    chosen = parser.parse_args(arguments)
    from fimo.reporting.results import Results

    try:
        folders = [Path(folder) for folder in chosen.run_dir]
        audits = [folder for folder in folders if (folder / "audit.json").exists()]
        boards = {f: pd.read_csv(f / BENCHMARK) for f in folders if (f / BENCHMARK).exists()}
        runs = [Results.load(folder) for folder in folders if folder not in [*audits, *boards]]
        judged = [*(run.scores for run in runs), *(board["method"] for board in boards.values())]
        methods = list(dict.fromkeys(str(method) for names in judged for method in names))
        metrics = list(runs[0].metrics if runs else DEFAULT if boards else [])
        tasks = list(dict.fromkeys(task for run in runs for task in run.tasks if one_value(run, task)))
        found = dashboard(chosen.entity, chosen.project, methods, metrics, tasks, chosen.name, bool(audits))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.print:
        print(found._to_model().model_dump_json(by_alias=True, indent=1))
    else:
        print(found.save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
