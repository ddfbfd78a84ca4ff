"""The further-training engine on a GPU, against a plain loop and vmap on the same GPU.

    python benchmarks/gpu.py [--data concrete.csv] [--seeds 100] [--epochs 500] [--only table] [--save DIR]

Prints a table, and writes it with all figures as ``gpu.json`` and ``gpu.txt``:

- ``table``: the paper's table of concrete, 100 seeds x (100 left out + 1) = 10,100 runs of 500 epochs (4,000
  steps of 128 instances), 103 test losses in float64 at each, from calling ``further_train`` to its result;
- ``loops``: time of a replica-step, evaluation at every epoch included: a plain PyTorch loop, vmap of
  torch.func and the engine over as many replicas as its chunk has, and over 50; its steps called one by one,
  recorded as CUDA graphs, in TF32 and float64; the table's time is extrapolated from some steps;
- ``agreement``: cosines of sensitivities, mean over test instances: float64 and float32 on the CPU and on the
  GPU, and TF32, with each other;
- ``block``: a transformer's block and head (width 384, 12 heads, 32 tokens, 1.8 M parameters, random
  weights), 50 left out x 20 seeds x 100 steps, against a plain loop;
- ``lora``: adapters of rank 8 on all attention layers of a GPT-2 of 124 M parameters with random weights,
  64 replicas of a batch of 4 x 64 tokens against one after another, some steps of each;
- ``methods``: Grad-Dot, DataInf and EK-FAC on the block (N = 600, J = 40) beside a plain forward and backward
  pass over its training set, and kronfluence's EK-FAC where that is installed.

Without ``--data`` the table is drawn at random in concrete's shape: 927 + 103 instances, 8 features. The
final model is an MLP 8-128-128-1, trained for 1,000 epochs by SGD .1. ``--device cpu`` tries the program.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fimo
from fimo.data.concrete import ConcreteData
from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, chunk_size
from fimo.engine.devices import products
from fimo.engine.replicas import Replica
from fimo.further_training import Protocol, Sensitivity, further_train
from fimo.models.final_model import FinalModel
from fimo.models.huggingface import Logits
from fimo.models.lora import add_adapters
from fimo.models.losses import cross_entropy, language_modelling, mean_squared_error

N, J, FEATURES, WIDTH, BATCH = 927, 103, 8, 128, 128
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", help="concrete's table; random numbers without")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--left-out", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=200, help="measured of each loop")
    parser.add_argument("--agreement-seeds", type=int, default=10)
    parser.add_argument("--agreement-epochs", type=int, default=100)
    parser.add_argument("--block-seeds", type=int, default=20, help="of the transformer's block")
    parser.add_argument("--lora-replicas", type=int, default=64)
    parser.add_argument("--lora-layers", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--save", type=Path, default=Path())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    device = torch.device(args.device)
    figures: Figures = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "data": "concrete" if args.data else "random, of concrete's shape",
        **{name: value for name, value in vars(args).items() if name not in ("save", "data", "device")},
    }
    lines = [f"{figures['device']}, torch {figures['torch']}, {figures['data']}"]
    args.save.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        figures[name], said = PARTS[name](args, device)
        lines += ["", f"{name}:", *said]
        print("\n".join(["", f"{name}:", *said]), flush=True)
        (args.save / "gpu.json").write_text(json.dumps(figures, indent=1))
        (args.save / "gpu.txt").write_text("\n".join([*lines, ""]))
    print("\n" + "\n".join(lines))


def concrete(args: argparse.Namespace, device: torch.device) -> tuple[FinalModel, Instances, Instances]:
    """Return a trained MLP, with training and test instances; all on the CPU."""
    if args.data:
        data = ConcreteData(args.data)
        data.setup("fit")
        train, test = data.train, data.test
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(N + J, FEATURES, generator=generator)
        y = x[:, :1] * x[:, 1:2] + x[:, 2:3].sin() + 0.3 * torch.randn(N + J, 1, generator=generator)
        train, test = Instances(x[:N], y[:N]), Instances(x[N:], y[N:])
    torch.manual_seed(0)
    model = FinalModel(network(), mean_squared_error)
    training = Protocol(lr=0.1, batch_size=BATCH, epochs=1000 if args.epochs > 20 else 20)
    chunk = Chunk(Setting.build(model, train, test, training, device), [Replica(0)])
    chunk.advance(training.total_steps(len(train)))
    trained = network()
    trained.load_state_dict({name: p[0].cpu() for name, p in chunk.network.parameters.items()})
    return FinalModel(trained, mean_squared_error), train, test


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
    )


def protocol(args: argparse.Namespace, **more: Any) -> Protocol:
    return Protocol(**{"lr": 0.03, "batch_size": BATCH, "epochs": args.epochs, **more})


def measure_table(args: argparse.Namespace, device: torch.device) -> tuple[Figures, list[str]]:
    """Make the whole table by the public function."""
    model, train, test = concrete(args, device)
    found, said = {}, []
    ways = {"float32": {}, "float64": {"dtype": "float64"}, "tf32": {"autocast": "tf32"}}
    for name, more in ways.items():
        if name == "tf32" and device.type == "cpu":
            continue
        seconds, _ = timed(
            device,
            lambda more=more: further_train(
                model, train, test, protocol(args, **more), args.seeds, args.left_out, trainer=trainer(device)
            ),
        )
        runs = args.seeds * (args.left_out + 1)
        steps = protocol(args).total_steps(len(train))
        operations = 6 * BATCH * sum(p.numel() for n, p in model.parameters().items() if "weight" in n)
        found[name] = {
            "seconds": seconds,
            "runs": runs,
            "steps": steps,
            "replica_steps_per_second": runs * steps / seconds,
            "teraflops": runs * steps * operations / seconds / 1e12,
            "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        }
        said.append(
            f"{name}: {runs:,} runs of {steps:,} steps, {len(test)} test losses at each of {args.epochs} "
            f"epochs: {seconds:.1f} s ({found[name]['teraflops']:.1f} TFLOP/s with everything)"
        )
    return found, said


def measure_loops(args: argparse.Namespace, device: torch.device) -> tuple[Figures, list[str]]:
    """Measure a replica-step of each way, evaluation included."""
    model, train, test = concrete(args, device)
    runs = args.seeds * (args.left_out + 1)
    total = runs * protocol(args).total_steps(len(train))
    replicas = chunk_size(
        Setting.build(model, train, test, protocol(args), device), args.seeds * args.left_out
    )
    seconds: dict[str, float] = {"plain loop": plain_loop(model, train, test, args.steps, device)}
    for size in (replicas, 50):
        seconds[f"vmap, {size:,} together"] = vmapped(model, train, test, size, args.steps // 2, device)
    ways: dict[str, dict[str, Any]] = {"engine, calls": {"graphs": False}, "engine, CUDA graphs": {}}
    if device.type == "cuda":
        ways["engine, CUDA graphs, TF32"] = {"autocast": "tf32"}
    ways["engine, CUDA graphs, float64"] = {"dtype": "float64"}
    for size in (replicas, 50):
        for name, more in ways.items():
            setting = Setting.build(model, train, test, protocol(args, **more), device)
            seconds[f"{name}, {size:,} together"] = engine(setting, size, args.steps, device)
    found: Figures = {
        name: {
            "microseconds": 1e6 * s,
            "table_seconds": s * total,
            "of_plain_loop": seconds["plain loop"] / s,
        }
        for name, s in seconds.items()
    }
    said = [
        f"{name:45s} {f['microseconds']:10.2f} us a replica-step, {f['table_seconds']:10.0f} s for "
        f"{runs:,} runs (extrapolated), {f['of_plain_loop']:8.1f} times the plain loop's speed"
        for name, f in found.items()
    ]
    return found, said


def engine(setting: Setting, replicas: int, steps: int, device: torch.device) -> float:
    """Return the engine's seconds for a replica-step, evaluations on the device included."""
    n = len(setting.train)
    chunk = Chunk(setting, [Replica(r // 100, (r * 9 % n,)) for r in range(max(2, replicas))])
    points = [step for step in chunk.evaluation_steps if step <= 16 + steps]

    def advance(until: int) -> None:
        for point in points:
            if chunk.step < point <= until:
                chunk.advance(point)
                chunk.measured()
        chunk.advance(until)

    advance(16)  # both sizes of batches, recorded
    seconds, _ = timed(device, lambda: advance(16 + steps))
    return seconds / steps / len(chunk.replicas)


def plain_loop(
    model: FinalModel, train: Instances, test: Instances, steps: int, device: torch.device
) -> float:
    """Return a loop's seconds for a step: data on the device, nothing read back, a fused optimizer."""
    own = copy.deepcopy(model.network).to(device).requires_grad_(True)
    train, test = train.to(device), test.to(device)
    assert isinstance(train.inputs, Tensor)
    assert isinstance(test.inputs, Tensor)
    optimizer = torch.optim.SGD(own.parameters(), 0.03, fused=True)
    recorded = []

    def advance(count: int) -> None:
        taken = 0
        while taken < count:
            order = torch.randperm(len(train), device=device)
            for index in order.split(BATCH):
                optimizer.zero_grad()
                F.mse_loss(own(train.inputs[index]), train.targets[index]).backward()
                optimizer.step()
                taken += 1
            with torch.no_grad():
                recorded.append((own(test.inputs) - test.targets).square().mean(1))

    advance(16)
    seconds, _ = timed(device, lambda: advance(steps))
    return seconds / (-(-steps // 8) * 8)  # whole epochs


def vmapped(
    model: FinalModel, train: Instances, test: Instances, replicas: int, steps: int, device: torch.device
) -> float:
    """Return the seconds for a replica-step of vmap(grad) over stacked parameters, as one writes it."""
    own = copy.deepcopy(model.network).to(device)
    train, test = train.to(device), test.to(device)
    assert isinstance(train.inputs, Tensor)
    parameters = {n: p.detach().expand(replicas, *p.shape).clone() for n, p in own.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(own, parameters, (x,)), y)

    gradient = vmap(grad(loss))
    evaluate = vmap(lambda p: (functional_call(own, p, (test.inputs,)) - test.targets).square().mean(1))
    recorded = []

    def advance(count: int) -> None:
        taken = 0
        while taken < count:
            order = torch.stack(
                [torch.randperm(len(train), device=device) for _ in range(max(1, replicas // 100))]
            )
            order = order.repeat_interleave(-(-replicas // len(order)), 0)[:replicas]
            for index in order.split(BATCH, 1):
                found = gradient(parameters, train.inputs[index], train.targets[index])
                for name, g in found.items():
                    parameters[name].sub_(g, alpha=0.03)
                taken += 1
            recorded.append(evaluate(parameters))

    with torch.no_grad():
        advance(8)
        seconds, _ = timed(device, lambda: advance(steps))
    return seconds / (-(-steps // 8) * 8) / replicas


def measure_agreement(args: argparse.Namespace, device: torch.device) -> tuple[Figures, list[str]]:
    """Compare sensitivities of the CPU, the GPU and lower precision with those of float64."""
    model, train, test = concrete(args, device)
    epochs = args.agreement_epochs

    def sensitivity(where: torch.device, **more: Any) -> Sensitivity:
        seconds, result = timed(
            device,
            lambda: further_train(
                model,
                train,
                test,
                protocol(args, epochs=epochs, **more),
                args.agreement_seeds,
                20,
                trainer=trainer(where),
            ),
        )
        print(f"{where.type} {more}: {seconds:.1f} s", flush=True)
        return result

    cpu = torch.device("cpu")
    kinds = {"CPU float64": sensitivity(cpu, dtype="float64"), "CPU float32": sensitivity(cpu)}
    if device.type == "cuda":
        kinds |= {"GPU float64": sensitivity(device, dtype="float64"), "GPU float32": sensitivity(device)}
        kinds |= {"GPU TF32": sensitivity(device, autocast="tf32")}
    points = sorted({e for e in (0, 4, 19, 99, epochs - 1) if e < epochs})
    pairs = [(a, b) for i, a in enumerate(kinds) for b in list(kinds)[i + 1 :]]
    found: Figures = {"epochs": [e + 1 for e in points]}
    after = ", ".join(str(e + 1) for e in points)
    said = [f"cosines, {args.agreement_seeds} seeds, 20 left out, after epochs {after}"]
    for a, b in pairs:
        x, y = kinds[a].sensitivity[points].double(), kinds[b].sensitivity[points].double()
        cosines = F.cosine_similarity(x, y, dim=-1).mean(1)
        found[f"{a}, {b}"] = cosines.tolist()
        said.append(f"{a:12s} {b:12s} " + " ".join(f"{c:.6f}" for c in cosines))
    return found, said


class Block(nn.Module):
    """A transformer's last block and head, on what the frozen ones below give: ``[n, T, 384] -> [n, 2]``."""

    def __init__(self, width: int = 384, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.head = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        return self.head(x.mean(1))


def measure_block(args: argparse.Namespace, device: torch.device) -> tuple[Figures, list[str]]:
    """Further training of a transformer's block, many runs together against one after another."""
    torch.manual_seed(0)
    x, y = torch.randn(600, 32, 384), torch.randint(2, (600,))
    train, test = Instances(x[:500], y[:500]), Instances(x[500:540], y[500:540])
    model = FinalModel(Block(), cross_entropy, accept_poor=True)
    steps, left_out, seeds = 100, 50, 20
    own = copy.deepcopy(model.network).to(device).requires_grad_(True)
    optimizer = torch.optim.SGD(own.parameters(), 0.01, fused=True)
    inputs, targets = train.inputs.to(device), train.targets.to(device)  # type: ignore[union-attr]
    found: Figures = {}
    said = []
    for name, more in (("float32", {}), ("tf32", {"autocast": "tf32"})):
        if more and device.type == "cpu":
            continue
        torch.set_float32_matmul_precision("high" if more else "highest")

        def loop(count: int) -> None:
            for step in range(count):
                index = torch.arange(step * 32, step * 32 + 32, device=device) % 500
                optimizer.zero_grad()
                F.cross_entropy(own(inputs[index]), targets[index]).backward()
                optimizer.step()

        loop(5)
        each = timed(device, lambda: loop(steps))[0] / steps
        torch.set_float32_matmul_precision("highest")
        further = Protocol(lr=0.01, batch_size=32, steps=steps, evaluate_every=steps, **more)
        seconds, _ = timed(
            device,
            lambda further=further: further_train(
                model, train, test, further, args.block_seeds, left_out, trainer=trainer(device)
            ),
        )
        runs = args.block_seeds * (left_out + 1)
        whole = seeds * (left_out + 1) * steps * each
        ours = seconds * seeds / args.block_seeds
        found[name] = {
            "seconds": seconds, "runs": runs, "table_seconds": ours, "plain_loop_ms": 1e3 * each,
            "plain_loop_table_seconds": whole,
        }  # fmt: skip
        said.append(
            f"{name}: {runs:,} runs of {steps} steps {seconds:.1f} s; "
            f"{seeds * (left_out + 1):,} runs: {ours:.0f} s"
            f"{'' if args.block_seeds == seeds else ' (extrapolated)'}, a plain loop {whole:.0f} s "
            f"(extrapolated from {steps} steps of {1e3 * each:.2f} ms): {whole / ours:.1f} times as fast"
        )
    return found, said


def measure_lora(args: argparse.Namespace, device: torch.device) -> tuple[Figures, list[str]]:
    """Steps of many replicas' adapters on one base model against one replica after another."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_layer=args.lora_layers, attn_implementation="eager", **none)
    network = Logits(GPT2LMHeadModel(config), causal=True)
    add_adapters(network, ["*c_attn"], rank=8)
    tokens = torch.randint(config.vocab_size, (260, 65))
    model = FinalModel(network, language_modelling, trainable=("*.up.*", "*.down.*"), accept_poor=True)
    data = Instances({"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous())
    train, test = data[:256], data[256:]
    replicas, steps = args.lora_replicas, 10
    found: Figures = {"parameters": sum(p.numel() for p in network.parameters()), "trained": model.size}
    said = [f"{found['parameters']:,} parameters, {model.size:,} of them trained"]
    for name, more in (("float32", {}), ("tf32", {"autocast": "tf32"})):
        if more and device.type == "cpu":
            continue
        further = Protocol(lr=0.01, batch_size=4, steps=100, evaluate_every=100, leave_out="mask", **more)
        setting = dataclasses.replace(
            Setting.build(model, train, test, further, device), engine="functional"
        )  # on a CPU too
        with products(device, bool(more)):
            each = adapters_of_one(setting, steps)
        chunk = Chunk(setting, [Replica(r, (r,)) for r in range(replicas)])
        chunk.advance(3)
        together = timed(device, functools.partial(chunk.advance, 3 + steps))[0] / steps
        recorded = chunk._graphs is not None and not chunk._graphs.refused
        del chunk
        found[name] = {"one_ms": 1e3 * each, "together_ms": 1e3 * together, "graphs": recorded}
        if device.type == "cuda":
            found[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        said.append(
            f"{name}: {replicas} replicas {1e3 * together:.1f} ms a step"
            f"{', as a CUDA graph' if recorded else ''}; one {1e3 * each:.1f} ms: "
            f"{replicas * each / together:.1f} times as fast"
        )
    return found, said


def adapters_of_one(setting: Setting, steps: int) -> float:
    """Return a plain loop's seconds for a step of one replica's adapters."""
    device = setting.device
    network = copy.deepcopy(setting.final_model.network).requires_grad_(False)
    trained = [network.get_parameter(n).requires_grad_(True) for n in setting.final_model.parameters()]
    optimizer = torch.optim.SGD(trained, 0.01)

    def loop(count: int) -> None:
        for step in range(count):
            batch = setting.train[torch.arange(4 * step, 4 * step + 4, device=device) % 256]
            optimizer.zero_grad()
            logits = network(**batch.inputs)
            F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
            optimizer.step()

    loop(3)
    return timed(device, lambda: loop(steps))[0] / steps


def measure_methods(args: argparse.Namespace, device: torch.device) -> tuple[Figures, list[str]]:
    """Attribute the block's test losses, in passes over its training set."""
    torch.manual_seed(0)
    n = 600 if device.type == "cuda" else 60
    x, y = torch.randn(n + 40, 32, 384), torch.randint(2, (n + 40,))
    train, test = Instances(x[:n], y[:n]).to(device), Instances(x[n:], y[n:]).to(device)
    model = FinalModel(Block(), cross_entropy, accept_poor=True).to(device)
    own = copy.deepcopy(model.network).requires_grad_(True)

    def plain_pass() -> None:
        for batch in train.batches(32):
            F.cross_entropy(own(batch.inputs), batch.targets).backward()

    seconds, scores = {}, {}
    ways: dict[str, Callable[[], Tensor | None]] = {"plain pass": plain_pass}  # type: ignore[dict-item]
    for name in ("graddot", "datainf", "ekfac"):
        ways[name] = functools.partial(attributed, model, train, test, name, device)
    if importlib.util.find_spec("kronfluence"):
        ways["kronfluence"] = functools.partial(kronfluence, own, train, test)
    for name, way in ways.items():
        way()  # libraries are loaded and kernels chosen
        seconds[name], scores[name] = timed(device, way)
    said = [f"N = {n}, {model.size:,} parameters"]
    for name, taken in seconds.items():
        said.append(f"{name:12s} {taken:8.3f} s, {taken / seconds['plain pass']:6.1f} passes")
    found: Figures = {"seconds": seconds, "n": n}
    if "kronfluence" in scores:
        a, b = (scores[k].double().cpu() for k in ("ekfac", "kronfluence"))
        found["cosine"] = F.cosine_similarity(a, b, dim=1).mean().item()
        said.append(f"cosine of both EK-FACs, mean over test instances: {found['cosine']:.3f}")
    return found, said


def attributed(
    model: FinalModel, train: Instances, test: Instances, method: str, device: torch.device
) -> Tensor:
    settings = {"memory_mb": 16384.0}
    return fimo.attribute(model, train, test, method, device=device, **settings).values


def kronfluence(network: nn.Module, train: Instances, test: Instances) -> Tensor:
    """Return kronfluence's EK-FAC scores ``[J, N]``, with our damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Classified(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            drawn = torch.multinomial(logits.detach().softmax(1), 1)[:, 0] if sample else batch[1]
            return F.cross_entropy(logits, drawn, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    task = Classified()
    with tempfile.TemporaryDirectory() as folder:
        data = [TensorDataset(part.inputs.cpu(), part.targets.cpu()) for part in (train, test)]  # type: ignore[union-attr]
        prepared = prepare_model(copy.deepcopy(network), task)
        analyzer = Analyzer("gpu", prepared, task, cpu=train.targets.device.type == "cpu", output_dir=folder)
        analyzer.fit_all_factors("factors", data[0], per_device_batch_size=100)
        analyzer.compute_pairwise_scores(
            "scores", "factors", query_dataset=data[1], train_dataset=data[0], per_device_query_batch_size=40,
            per_device_train_batch_size=100, score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        scores: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores


def trainer(device: torch.device) -> dict[str, Any]:
    return {"accelerator": "gpu" if device.type == "cuda" else "cpu"}


def timed(device: torch.device, function: Callable[[], Any]) -> tuple[float, Any]:
    """Return a function's seconds until the device has done its work, and its value."""
    wait(device)
    began = time.perf_counter()
    value = function()
    wait(device)
    return time.perf_counter() - began, value


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], tuple[Figures, list[str]]]] = {
    "table": measure_table,
    "loops": measure_loops,
    "agreement": measure_agreement,
    "block": measure_block,
    "lora": measure_lora,
    "methods": measure_methods,
}

if __name__ == "__main__":
    main()
