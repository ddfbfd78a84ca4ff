"""What `best` shows and costs in deep networks, beside the gold standard, in one run for each case.

    python benchmarks/deep.py --data FOLDER

prints, for each case, the gold standard's seconds, the share of them that `best` (which follows other seeds)
and Grad-Dot take, and their agreement (cosine, mean over test instances), in brackets as a share of the noise
ceiling, at evaluation points of two epochs. ``again`` is the gold standard made again. FOLDER
holds ``sst2/`` (train.tsv, validation.tsv), ``cifar10/`` (train/CLASS/*, test/CLASS/*) and
``wikitext2/train.txt``. Final models are trained first; that of ``gpt2_lora`` is a model of 4 layers that was
trained on later text, and got adapters.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

from fimo.data.tokens import ByteTokens
from fimo.models.huggingface import causal_lm
from fimo.models.losses import language_modelling

ROOT = Path(__file__).parents[1]
SST2 = ["experiment=sst2_small", "dataset.path={data}/sst2", "dataset.max_length=32"]
GPT2 = ["dataset=language", "dataset.path={excerpt}", "model=causal_lm", "dataset.length=32",
        "dataset.batch_size=16", "further_training=adamw", "further_training.leave_out=mask",
        "model.network.width=48", "trainer.max_epochs=10"]  # fmt: skip
LORA = "++model.network.adapters={{{{rank: 4, alpha: 8, layers: [{layers}]}}}}"  # formatted twice
ADAPTED = 'model.trainable=["head*","*.up.*","*.down.*"]'
CASES = {
    "minilm_block": [*SST2, 'model.trainable=["head*","*layer.5.*"]'],
    "minilm_lora": [*SST2, ADAPTED, LORA.format(layers='"*query","*key","*value","*attention.output.dense"')],
    "resnet9": ["experiment=cifar10_small", "dataset.path={data}/cifar10", "model.network.width=8",
                "model.trainable=[]", "further_training.batch_size=32"],
    "gpt2": GPT2,
    "gpt2_lora": [*GPT2, "model.network.path={base}", "dataset.tokenizer=null", "further_training.lr=1e-3",
                  'model.trainable=["*.up.*","*.down.*"]',
                  LORA.format(layers='"*attn.c_attn","*attn.c_proj"')],
}  # fmt: skip
LENGTH = 32
"""Bytes of a passage."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder of the data sets")
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    p.add_argument(
        "--train", type=int, default=1500, help="training instances, where the data set draws them"
    )
    p.add_argument("--left-out", type=int, default=50)
    p.add_argument("--tests", type=int, default=40)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--points", type=int, default=6, help="evaluation points of two epochs, about")
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    for name in a.cases:
        with tempfile.TemporaryDirectory() as folder:
            show(name, run(name, a, Path(folder)))


def run(name: str, a: argparse.Namespace, folder: Path) -> Path:
    """Run a case, and return the run's folder."""
    language = name.startswith("gpt2")
    batch, excerpt, base = 16 if language else 32, folder / "excerpt.txt", folder / "base"
    if language:  # passages of which a tenth is held out
        text = (Path(a.data) / "wikitext2" / "train.txt").read_bytes()
        excerpt.write_bytes(text[: int(LENGTH * a.train / 0.9)])
        if name == "gpt2_lora":
            train_base(text[len(text) // 2 :], base)
    command = [
        sys.executable, "-m", "src.run",
        *(setting.format(data=a.data, excerpt=excerpt, base=base) for setting in CASES[name]),
        "+method=[best,graddot]", *([] if language else [f"dataset.train_size={a.train}"]),
        f"threads={a.threads}",
        "further_training.epochs=2", f"further_training.left_out={a.left_out}",
        f"further_training.test={a.tests}", f"further_training.seeds={a.seeds}",
        f"further_training.evaluate_every={max(1, 2 * a.train // batch // a.points)}",
        "logger=none", "report=false", f"store={folder}/store", f"hydra.run.dir={folder}/run",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    return folder / "run"


def train_base(text: bytes, folder: Path, steps: int = 1500) -> None:
    """Train a small GPT-2 on bytes of a text, and save it as Hugging Face's library does."""
    torch.manual_seed(0)
    network = causal_lm(ByteTokens.vocabulary, width=128, layers=4, positions=64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    for _ in range(steps):
        start = torch.randint(len(data) - LENGTH - 1, (32, 1))
        passage = data[start + torch.arange(LENGTH + 1)]
        logits = network(passage[:, :-1], torch.ones_like(passage[:, :-1]))
        optimizer.zero_grad()
        language_modelling(logits, passage[:, 1:]).mean().backward()
        optimizer.step()
    network.model.save_pretrained(folder)


def show(name: str, folder: Path) -> None:
    """Print a case's table."""
    cost = pd.read_csv(folder / "cost.csv").set_index("stage")["seconds"]
    table = pd.read_csv(folder / "evaluation.csv")
    table = table[(table["metric"] == "cosine") & (table["seeds"] == table["seeds"].max())]
    gold = cost["further_training"]
    print(f"\n{name}: gold standard {gold:.0f} s")
    steps = sorted(table["step"].unique())
    print(f"{'':12s} {'cost':>6s} " + " ".join(f"{step:>12d}" for step in steps))
    some = table[table["method"] == "best"].set_index("step")
    cells = [f"{c:6.3f} ({c / some['ceiling'][s]:.2f})" for s, c in some["ceiling_lower"].items()]
    print(f"{'again':12s} {1.0:6.3f} " + " ".join(cells))
    for method, rows in table.groupby("method"):
        rows = rows.set_index("step")
        cells = [f"{rows['mean'][s]:6.3f} ({rows['mean'][s] / rows['ceiling'][s]:.2f})" for s in steps]
        print(f"{method:12s} {cost[method] / gold:6.3f} " + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()
