"""What runs on a GPU gives what the CPU gives; left out where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fimo
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.projection import _column, project
from fimo.curvature.shared_rows import shared_rows
from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, chunk_size
from fimo.engine.replicas import Replica, Unit
from fimo.further_training import Protocol
from fimo.methods.catalogue import all_methods, method_files, own_methods, packaged_conf
from tests.cases import CASES, Case, mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")

GPU = torch.device("cuda")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 0.01},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "clipped_adam": {"optimizer": "adam", "lr": 0.02, "clip_norm": 0.1},
    "lion": {"optimizer": "lion", "lr": 0.01},
}
METHODS = [
    "arnoldi", "best", "bif", "calibrated", "cg", "datainf", "daunce", "ekfac", "embedding", "exact",
    "gradcos", "graddot", "kfac", "knn_shapley", "less", "lissa", "lissa_h", "logra", "mirrored", "random",
    "representer", "response", "sketched", "source", "tracin", "trak", "unlearning", "unrolled",
]  # fmt: skip


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
@pytest.mark.parametrize("name", list(CASES))
def test_steps_recorded_as_graphs_give_the_same_bytes_and_the_cpus_losses(
    name: str, rule: str, optimizer: str
) -> None:
    case: Case = CASES[name]()  # float64: what differs is no rounding that training amplifies
    units: list[Unit] = [(1,), (4,), (9,)]
    found = {}
    for kind, device, graphs in (("cpu", "cpu", True), ("calls", "cuda", False), ("graphs", "cuda", True)):
        protocol = Protocol(
            batch_size=5, epochs=4, leave_out=rule, dtype="float64", graphs=graphs, **OPTIMIZERS[optimizer]
        )
        setting = Setting.build(case.final_model, case.train, case.test, protocol, device)
        chunk = Chunk(setting, [Replica(3, unit) for unit in units])
        chunk.advance(chunk.evaluation_steps[-1])
        found[kind] = chunk.evaluate()[0]
        recorded = chunk._graphs is not None and all(chunk._graphs._recorded.values())
        assert recorded == (kind == "graphs")
    assert torch.equal(found["calls"], found["graphs"])
    torch.testing.assert_close(found["cpu"], found["graphs"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", list(CASES))
def test_sensitivities_are_the_cpus(name: str) -> None:
    case = CASES[name]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=6, lr=0.05)
    cpu, gpu = (
        fimo.further_train(
            case.final_model, case.train, case.test, protocol, seeds=20, left_out=8, device=device
        )
        for device in ("cpu", "cuda")
    )
    assert gpu.raw.device.type == "cpu"
    for e in range(6):
        assert cosine(cpu.sensitivity[e], gpu.sensitivity[e]) > 0.9999


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp_regression", "mlp_classification", "conv_net"])
def test_scores_are_the_cpus(name: str, method: str) -> None:
    case = CASES[name]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=3, lr=0.05)

    def scores(device: str) -> fimo.Scores:
        return fimo.attribute(
            case.final_model, case.train, case.test, method, left_out=8, further_training=protocol,
            seeds=2, device=device,
        )  # fmt: skip

    cpu, gpu = scores("cpu"), scores("cuda")
    assert gpu.values.device.type == "cpu"
    assert cosine(cpu.values, gpu.values) > 0.999


def test_every_method_is_tried() -> None:
    files = method_files([packaged_conf()])
    assert sorted(own_methods(all_methods(files.values()))) == METHODS


@pytest.mark.parametrize("name", ["mlp_regression", "transformer"])
def test_what_was_checked_passes(name: str) -> None:
    case = CASES[name]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=3, lr=0.05)
    found = fimo.check(
        case.final_model, case.train, case.test, protocol, seeds=2, left_out=4, device=GPU, seconds=6
    )
    assert [line for line in found if str(line.verdict) == "fail"] == []


def test_tensor_float_is_a_choice_that_ends_with_the_steps() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(80, 64), torch.randn(80, 1)  # wide enough for the library to take it
    model = fimo.FinalModel(mlp(64, (128, 128), 1, torch.nn.ReLU), "mse", accept_poor=True)
    losses = {}
    for autocast in (None, "tf32"):
        protocol = Protocol(batch_size=16, steps=12, lr=0.05, autocast=autocast)
        setting = Setting.build(model, Instances(x[:64], y[:64]), Instances(x[64:], y[64:]), protocol, GPU)
        chunk = Chunk(setting, [Replica(r, (r,)) for r in range(16)])
        chunk.advance(12)
        losses[autocast] = chunk.evaluate()[0]
        assert torch.get_float32_matmul_precision() == "highest"
    difference = (losses[None] - losses["tf32"]).abs().max() / losses[None].abs().max()
    assert 1e-6 < difference < 1e-2


@pytest.mark.parametrize("name", ["mlp_classification", "conv_net"])
def test_methods_of_one_run_share_gradients_there(name: str) -> None:
    case = CASES[name]().to(torch.float32)
    given = case.final_model, case.train, case.test
    several = ["graddot", "gradcos", "datainf", "logra", "less", "ekfac", "kfac", "trak"]
    found = fimo.attribute(*given, several, device=GPU)
    for method in several:
        alone = fimo.attribute(*given, method, device=GPU)
        torch.testing.assert_close(found[method].values, alone.values, msg=method)
        assert found[method].gradient_evaluations == alone.gradient_evaluations
    model, train = case.final_model.to(GPU), case.train.to(GPU)
    with shared_rows(model) as shared:
        shared.set_of(train)
        rows = [InstanceGradients(model).losses(train, "layers") for _ in range(2)]
        assert rows[0] is rows[1]
        assert rows[0].device.type == "cuda"
        assert shared.set_of(case.train.to(GPU)) is train


def test_a_chunk_takes_what_memory_is_free() -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    setting = Setting.build(case.final_model, case.train, case.test, Protocol(epochs=1), GPU)
    before = chunk_size(setting, 10**6)
    kept = torch.empty(torch.cuda.mem_get_info()[0] // 2, dtype=torch.uint8, device=GPU)
    del kept  # the allocator keeps it for torch's next tensors
    assert chunk_size(setting, 10**6) == before


def test_projections_are_drawn_alike_on_every_device() -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    cpu = InstanceGradients(case.final_model).losses(case.train)
    gpu = InstanceGradients(case.final_model.to(GPU)).losses(case.train.to(GPU))
    for kind in ("normal", "sign"):
        assert torch.equal(_column(cpu, 3, kind, 1), _column(gpu, 3, kind, 1).cpu())
    found = project(cpu, 8, "sparse", 1), project(gpu, 8, "sparse", 1).cpu()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
