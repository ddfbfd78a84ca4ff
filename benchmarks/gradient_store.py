"""Tokens a second of a kept set of projected gradients: logra's beside bergson's.

    pip install --target FOLDER --no-deps bergson simple-parsing docstring-parser jaxtyping wadler-lindig \\
        natsort petname ml_dtypes accelerate peft psutil
    PYTHONPATH=FOLDER python benchmarks/gradient_store.py [--n 256] [--length 128] [--dimension 16]
        [--batch 16] [--times 2]

A GPT-2 of about 14 million parameters (vocabulary 50,257, width 208, 6 layers) with random weights, random
tokens; gradients of the weights of the linear layers in its blocks, each projected from both sides to
dimension x dimension, as float32 in files. Both in this process, in turn; the least seconds of the processor
count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fimo
from fimo.data.instances import Instances
from fimo.methods.logra import Logra
from fimo.models.huggingface import causal_lm

VOCABULARY = 50_257


def bergson_store(network: Any, tokens: torch.Tensor, options: argparse.Namespace) -> Callable[[Path], None]:
    from bergson import GradientProcessor, IndexConfig, collect_gradients
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    batches = [list(range(s, min(s + options.batch, len(data)))) for s in range(0, len(data), options.batch)]
    for parameter in network.parameters():
        parameter.requires_grad_(True)  # its hooks need a graph; gradients of weights are not made

    def make(folder: Path) -> None:
        cfg = IndexConfig(
            run_path=str(folder), projection_dim=options.dimension, token_batch_size=10**6,
            loss_reduction="mean", drop_columns=False,
        )  # fmt: skip
        cfg.partial_run_path.mkdir(parents=True, exist_ok=True)
        processor = GradientProcessor(projection_dim=options.dimension)
        collect_gradients(network, data, processor, cfg, batches=batches)

    return make


def fimo_store(network: Any, tokens: torch.Tensor, options: argparse.Namespace) -> Callable[[Path], None]:
    patterns = ("*.h.*.attn.*weight", "*.h.*.mlp.*weight")
    model = fimo.FinalModel(network, "language_modelling", trainable=patterns, accept_poor=True)
    train = Instances({"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous())

    def make(folder: Path) -> None:
        method = Logra(dimension=options.dimension, cache=str(folder), memory_mb=options.memory)
        assert method.keep(model, train) == len(train)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--n", type=int, default=256)
    add("--length", type=int, default=128)
    add("--dimension", type=int, default=16)
    add("--batch", type=int, default=16)
    add("--memory", type=float, default=640, help="logra's memory_mb; 640: batches of about 16")
    add("--times", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = causal_lm(VOCABULARY, width=208, layers=6, heads=4, positions=options.length)
    tokens = torch.randint(VOCABULARY, (options.n, options.length))
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters", flush=True)
    inner = next(m for m in network.modules() if type(m).__name__ == "GPT2LMHeadModel")
    stores = {"fimo": fimo_store(network, tokens, options), "bergson": bergson_store(inner, tokens, options)}
    first = tokens[: options.batch]  # what is loaded when first used
    for make in (fimo_store(network, first, options), bergson_store(inner, first, options)):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "store")
    least = dict.fromkeys(stores, float("inf"))
    for _ in range(options.times):
        for name, make in stores.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.process_time()
                make(Path(folder) / "store")
                least[name] = min(least[name], time.process_time() - began)
                size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
            print(f"{name:8} {least[name]:.2f} s of a processor, {size / 2**20:.1f} MiB", flush=True)
    for name, seconds in least.items():
        print(f"{name:8} {options.n * options.length / seconds:,.0f} tokens a second")


if __name__ == "__main__":
    main()
