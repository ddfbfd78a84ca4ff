"""Who finds label errors that were planted before the final model was trained, and whether rates are held.

    python benchmarks/label_errors.py --dataset digits --shares .02 .05 .1 --repetitions 20

prints for each share of flipped labels the average precision (mean ± standard error over repetitions, each
with other flips, other initial parameters and another order of the data) of

- ``own loss``: of the final model on the row itself;
- ``graddot``, ``self_effect``: self-influence, the squared gradient and what an audit predicts of the row's
  effect on itself (the response in EK-FAC's eigenbasis);
- ``cleanlab``: its label quality score, the probability of the label by the same training without the row's
  fold (of five), by cleanlab itself where that is installed;
- ``suspects``: :func:`fimo.audit.suspects.suspects`, and then its list at a false discovery rate of .10: the
  share of it that was not flipped (0 where it is empty), the share of flipped labels that it holds, both also
  of the list that takes labels as certain, and the largest share that a cut of its order holds at that rate
  (``at best``: only who knows the flips finds it).

Data sets: digits, breast_cancer; with ``--path`` sst2 (a folder with train.tsv, and ``--minilm`` a folder
with the encoder: 3,000 sentences, a linear head on MiniLM's embeddings), adult (its CSV file: 3,000 rows, the
column fnlwgt left out). Rows that are wrong already count as not flipped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fimo.audit.suspects import Suspects, suspects
from fimo.curvature.gradients import InstanceGradients
from fimo.data.bundled import BundledData
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.evaluation.label_errors import average_precision, flip_labels
from fimo.further_training import full_runs, further_train
from fimo.further_training.trajectory import FurtherTraining
from fimo.linear_response.gradient_flow import MeanBatchResponse
from fimo.linear_response.recursion import with_parameters
from fimo.models.final_model import FinalModel
from fimo.models.mlp import mlp

TRAINING = {
    "digits": Protocol("sgd", lr=0.1, batch_size=32, epochs=30),  # as conf/dataset recommends
    "breast_cancer": Protocol("sgd", lr=0.03, batch_size=32, epochs=100),
    "adult": Protocol("sgd", lr=0.03, batch_size=32, epochs=30),
    "sst2": Protocol("adamw", lr=0.01, batch_size=64, epochs=10),
}
"""Of the final model."""

ROWS, FOLDS, RATE = 3000, 5, 0.1


def data(name: str, path: Path | None, minilm: Path | None) -> Instances:
    if name in ("digits", "breast_cancer"):
        module = BundledData(name=name)
        module.setup()
        return module.train
    assert path is not None, "--path is needed"
    if name == "adult":
        table = pd.read_csv(path, skipinitialspace=True, na_values="?").drop(columns="fnlwgt")
        table = table.sample(ROWS, random_state=0)
        labels = torch.tensor((table.pop("income") == ">50K").to_numpy(), dtype=torch.int64)
        features = torch.tensor(pd.get_dummies(table, dtype=float).to_numpy(), dtype=torch.float32)
        return Instances((features - features.mean(0)) / features.std(0).clamp(min=1e-6), labels)
    table = pd.read_csv(path / "train.tsv", sep="\t", quoting=3).sample(ROWS, random_state=0)
    assert minilm is not None, "--minilm is needed"
    labels = torch.tensor(table["label"].to_numpy())
    return Instances(embeddings(list(table["sentence"]), minilm), labels)


@torch.no_grad()
def embeddings(texts: list[str], folder: Path) -> Tensor:
    """Return the mean over tokens of the encoder's last layer, ``[N, 384]``."""
    from transformers import AutoModel, AutoTokenizer

    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for start in range(0, len(texts), 64):
        part = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        mask = part["attention_mask"][:, :, None]
        found.append((encoder(**part).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def initial(name: str, train: Instances, classes: int, seed: int) -> FinalModel:
    torch.manual_seed(seed)
    assert isinstance(train.inputs, Tensor)
    width = train.inputs.shape[1]
    network = nn.Linear(width, classes) if name == "sst2" else mlp(width, classes)
    return FinalModel(network, "cross_entropy", accept_poor=True)


def cleanlab(start: FinalModel, train: Instances, training: Protocol, seed: int) -> Tensor:
    """Return minus the label quality score of each row ``[N]``."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    fold = order.argsort() % FOLDS
    groups = [(fold == k).nonzero()[:, 0].tolist() for k in range(FOLDS)]
    runs = further_train(start, train, train, training, [seed], groups)
    assert runs.full_losses is not None
    losses = runs.full_losses[0, -1, :, None] + runs.raw[0, -1].double()
    probability = (-losses.gather(1, fold[:, None])[:, 0]).exp()
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return -probability
    # the score of the label alone: what is left goes to the other classes, whose probabilities it ignores
    classes = int(train.targets.max()) + 1
    whole = ((1 - probability) / (classes - 1))[:, None].repeat(1, classes)
    whole.scatter_(1, train.targets[:, None], probability[:, None])
    return -torch.from_numpy(get_label_quality_scores(train.targets.numpy(), whole.numpy()))


def at_best(score: Tensor, flipped: Tensor) -> float:
    """Return the largest share of flips that any cut of an order finds with the rate asked for."""
    found = flipped[score.argsort(descending=True)].double().cumsum(0)
    share = 1 - found / torch.arange(1, len(found) + 1)
    return float((found * (share <= RATE)).max() / found[-1])


def of_list(found: Suspects, flipped: Tensor, suffix: str = "") -> dict[str, float]:
    """Return how long a list is, the share of it that was not flipped, and the share of flips in it."""
    listed = found.within(RATE)
    return {
        f"listed{suffix}": len(listed),
        f"fdr{suffix}": float((~flipped[listed]).double().mean()) if len(listed) else 0.0,
        f"found{suffix}": float(flipped[listed].sum() / flipped.sum()),
    }


def self_influences(model: FinalModel, train: Instances, training: Protocol) -> dict[str, Tensor]:
    rows = InstanceGradients(model, 256).losses(train)
    squares = torch.cat([piece.dense().square().flatten(1).sum(1) for piece in rows.pieces()])
    further = Protocol("sgd", lr=0.01, batch_size=32, epochs=10, leave_out="mask")
    steps = (further.total_steps(len(train)),)
    followed = FurtherTraining(further, steps, (), lambda: iter(()))
    response = MeanBatchResponse(
        model, train, followed, 1, "outputs", 1024, torch.ones(len(train), dtype=torch.int64)
    )
    return {"graddot": squares, "self_effect": response.of_themselves()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=list(TRAINING), default="digits")
    parser.add_argument("--path", type=Path, help="of adult.csv, or of the folder with sst2's train.tsv")
    parser.add_argument("--minilm", type=Path, help="the folder of the sentence encoder, for sst2")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first repetition")
    parser.add_argument("--table", type=Path, help="CSV file that every repetition is added to")
    chosen = parser.parse_args()
    right, training = data(chosen.dataset, chosen.path, chosen.minilm), TRAINING[chosen.dataset]
    classes, rows = int(right.targets.max()) + 1, []
    for repetition in range(chosen.first, chosen.first + chosen.repetitions):
        for share in chosen.shares:
            generator = torch.Generator().manual_seed(repetition)
            targets, flipped = flip_labels(right.targets, share, classes, generator)
            train = Instances(right.inputs, targets)
            start = initial(chosen.dataset, train, classes, repetition)
            trajectory = next(iter(full_runs(start, train, training, [repetition])))
            model = with_parameters(start, trajectory.parameters[-1])
            orders = {"own loss": model.losses(train), **self_influences(model, train, training)}
            orders["cleanlab"] = cleanlab(start, train, training, repetition)
            began = time.perf_counter()
            found = suspects(model, train, seed=repetition)
            seconds = time.perf_counter() - began
            orders["suspects"] = found.score
            precision = {n: float(average_precision(v.double(), flipped)) for n, v in orders.items()}
            bold = suspects(model, train, certain=True, seed=repetition)
            rows.append(
                {
                    "dataset": chosen.dataset, "share": share, "repetition": repetition, **precision,
                    "seconds": seconds, "estimated share": found.share,
                    **of_list(found, flipped), **of_list(bold, flipped, ", certain"),
                    "at best": at_best(found.score, flipped),
                    "right label": float((found.suggested == right.targets)[flipped].double().mean()),
                }
            )  # fmt: skip
            if chosen.table is not None:
                table = pd.DataFrame(rows[-1:])
                table.to_csv(chosen.table, mode="a", index=False, header=not chosen.table.exists())
    show(pd.DataFrame(rows))


def show(rows: pd.DataFrame) -> None:
    """Print mean ± standard error over repetitions."""
    for (name, share), part in rows.groupby(["dataset", "share"]):
        print(f"{name}, {share:.0%} flipped, {len(part)} repetitions")
        for column in part.columns[3:]:
            sem = part[column].std() / len(part) ** 0.5 if len(part) > 1 else float("nan")
            print(f"  {column:16} {part[column].mean():7.3f} ± {sem:.3f}")


if __name__ == "__main__":
    main()
