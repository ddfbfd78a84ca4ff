"""A ready W&B dashboard, defined by code: ``python -m fimo.reporting.dashboard --entity TEAM RUN_DIR…``.

Needs ``pip install wandb-workspaces``, and a login to save; ``--print`` shows the definition without one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fimo.errors import InputError
from fimo.live.agreement import STEP

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

    from fimo.reporting.results import Results


def dashboard(
    entity: str,
    project: str,
    methods: Sequence[str],
    metrics: Sequence[str],
    tasks: Sequence[str] = (),
    name: str = "fimo",
) -> Workspace:
    """Return a workspace that overlays runs: what they agree on, what they cost, their instances.

    Args:
        entity: user or team.
        methods: whose agreement is drawn; of several runs, all.
        metrics: a section's panels, one for each.
        tasks: further evaluations with one summary value for each method, as ``datamodeling``.

    Raises:
        InputError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as spaces
    except ImportError as error:
        raise InputError("wandb-workspaces", "not installed; pip install wandb-workspaces") from error

    def lines(metric: str) -> panels.LinePlot:
        keys = [f"agreement/{method}/{metric}" for method in methods]
        return panels.LinePlot(
            title=metric, x=STEP, y=[*keys, f"ceiling/{metric}"], title_x="optimizer steps"
        )

    def bars(title: str, keys: Sequence[str]) -> panels.BarPlot:
        return panels.BarPlot(title=title, metrics=list(keys))

    first = metrics[0]
    media = [f"figures/{figure}/{first}" for figure in ("agreement", "seeds", "cost", "mean")]
    sections = [
        spaces.Section("Agreement with further training", [lines(m) for m in metrics], is_open=True),
        spaces.Section(
            "Last evaluation point",
            [
                bars(f"{first} by method", [f"last/{m}/{first}" for m in methods]),
                panels.ScatterPlot(
                    title=f"best {first} against the seconds of further training",
                    x=panels.SummaryMetric("cost/further_training/seconds"),
                    y=panels.SummaryMetric(f"best/{first}"),
                ),
                panels.LinePlot(title="distance from the final model / its norm", x=STEP, y=["distance"]),
                *[bars(task, [f"{task}/{m}" for m in methods]) for task in tasks],
            ],
            is_open=True,
        ),
        spaces.Section("Instances", [panels.WeavePanelSummaryTable(table_name="instances")], is_open=True),
        spaces.Section("Figures", [panels.MediaBrowser(media_keys=[key]) for key in media], is_open=False),
        spaces.Section("What differs between runs", [panels.RunComparer(diff_only="split")], is_open=False),
    ]
    settings = spaces.WorkspaceSettings(x_axis=STEP, max_runs=50)
    return spaces.Workspace(entity, project, name=name, sections=sections, settings=settings)


def one_value(run: Results, task: str) -> bool:
    """Whether a task's table comes down to one number for each method, which W&B's summary holds."""
    curve = run.curve(task)
    return curve is None or curve.x == "epoch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fimo.reporting.dashboard", description=__doc__)
    parser.add_argument("run_dir", nargs="+", help="folders of runs, whose methods the dashboard draws")
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="fimo")
    parser.add_argument("--name", default="fimo", help="of the dashboard")
    parser.add_argument("--print", action="store_true", help="show the definition as JSON, save nothing")
    chosen = parser.parse_args(arguments)
    from fimo.reporting.results import Results

    try:
        runs = [Results.load(folder) for folder in chosen.run_dir]
        methods = list(dict.fromkeys(method for run in runs for method in run.scores))
        tasks = list(dict.fromkeys(task for run in runs for task in run.tasks if one_value(run, task)))
        found = dashboard(chosen.entity, chosen.project, methods, runs[0].metrics, tasks, chosen.name)
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
