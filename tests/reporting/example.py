"""A run's results made up of signal and noise, with tables or sentences to show."""

from __future__ import annotations

import pandas as pd
import torch

from fimo.evaluation import assess
from fimo.reporting import InstanceDisplay, Results, collect
from fimo.scores import Access, Scores
from tests.evaluation.synthetic import synthetic


def show_row(split: str, index: int) -> InstanceDisplay:
    row = {"age": 48.0 + index, "blood pressure": 101.5 - index / 7, "sex": "female" if index % 2 else "male"}
    return InstanceDisplay(f"{100 + index} mg", row, prediction=f"{103 + index} mg", loss=0.25)


def show_text(split: str, index: int) -> InstanceDisplay:
    return InstanceDisplay("positive", text=f"<script>alert({index})</script> a {split} sentence & more")


def example_tasks() -> dict[str, pd.DataFrame]:
    """Return tables of the further evaluations."""
    methods = ["graddot", "random"]
    datamodeling = pd.DataFrame(
        [
            (m, "FiMO", "lds", 8 * e, e, 6, 0.5 / e * (m == "graddot"), 0.02, 0.9)
            for m in methods
            for e in range(1, 5)
        ],
        columns=["method", "access", "metric", "step", "epoch", "seeds", "mean", "sem", "ceiling"],
    )
    removal = pd.DataFrame(
        [
            (m, 32, 4, k, 6, 1e-3 * k * (m == "graddot"), 1e-4)
            for m in [*methods, "chance"]
            for k in (1, 3, 10)
        ],
        columns=["method", "step", "epoch", "removed", "seeds", "mean", "sem"],
    )
    mislabelled = pd.DataFrame(
        [("graddot", 3, 0.6, 0.05, 0.1), ("random", 3, 0.12, 0.03, 0.1)],
        columns=["method", "repeats", "mean", "sem", "chance"],
    )
    return {"datamodeling": datamodeling, "removal": removal, "mislabelled": mislabelled}


def example(
    name: str = "example", seeds: int = 6, noise: float = 1.0, show: object = show_row, **changes: object
) -> Results:
    """Return results of four methods on synthetic sensitivities."""
    sensitivity, signal = synthetic(seeds=seeds, noise=noise)
    generator = torch.Generator().manual_seed(1)
    unrelated = torch.randn(signal[0].shape, generator=generator)
    scores = {
        "graddot": ("FiMO", 30 * signal[0].float()),
        "datainf": ("FiMO", (signal[0] + 0.5 * signal[2]).float()),
        "follows": ("TAA", signal.float()),
        "random": ("FiMO", unrelated),
    }
    known = {
        m: Scores(values, sensitivity.left_out, m, Access(a), m == "datainf", test=sensitivity.test)
        for m, (a, values) in scores.items()
    }
    evaluation = assess(scores, sensitivity, estimate_loss_change=["datainf"], resamples=5)
    stages = ["final_model", "further_training", *scores, "evaluation", "report"]
    cost = pd.DataFrame(
        {
            "stage": stages,
            "seconds": [12.5, 95.0, 0.04, 0.7, 8.0, 0.001, 1.0, 2.0],
            "peak_memory_mb": 512.0,
            "gradient_evaluations": 1000,
            "reused": [0.0, 0.5, 0, 0, 1.0, 0, 0, 0],
        }
    )
    steps = sensitivity.step.tolist()
    distance = pd.DataFrame(
        [
            (s, s // 8, seed, 0.01 * s + 0.001 * seed, 0.001 * s + 0.0001 * seed)
            for s in steps
            for seed in range(seeds)
        ],
        columns=["step", "epoch", "seed", "distance", "relative"],
    )
    content = {
        "final_model": {"train_loss": 0.3, "test_loss": 0.5, "baseline_loss": 1.02},
        "config": {
            "dataset": {"name": "diabetes", "batch_size": 32},
            "further_training": {"optimizer": "sgd", "lr": 0.01, "batch_size": 32, "leave_out": "shift"},
        },
        "versions": {"fimo": "0.1.0", "torch": "2.13.0"},
        "dataset": {"name": "diabetes", "task": "regression", "train": 397, "test": 45},
        "descriptions": {"graddot": "Inner product of loss gradients.", "random": "Knows nothing."},
        "skipped": {"exact": "the network has 1,000,000 parameters"},
        "warnings": evaluation.notes,
        "distance": distance,
        "shown": collect(sensitivity, show),  # type: ignore[arg-type]
    } | changes
    return Results(
        name=name,
        sensitivity=sensitivity,
        scores=known,
        evaluation=evaluation.table,
        cost=cost,
        bootstrap=evaluation.bootstrap,
        slopes=evaluation.slopes,
        **content,  # type: ignore[arg-type]
    )
