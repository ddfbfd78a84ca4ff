"""LESS, TRAK and LoGra on one mechanism of kept rows: the same scores, made once, and never another's."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fimo.curvature import projected_gradients
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.less import Less
from fimo.methods.logra import Logra
from fimo.methods.projected import ProjectedRowsMethod
from fimo.methods.trak import Trak
from fimo.models.final_model import FinalModel
from fimo.store.row_files import RowFiles
from fimo.store.sources import PACKAGE_SOURCES
from tests.cases import CASES, Case

Make = Callable[..., ProjectedRowsMethod]

METHODS: dict[str, Make] = {
    "less": lambda **more: Less(**{"batch_size": 3, **more}),
    "less_projected": lambda **more: Less(**{"batch_size": 3, "dimension": 7, **more}),
    "trak": lambda **more: Trak(**{"dimension": 5, **more}),
    "trak_of_few_instances": lambda **more: Trak(**{"dimension": 64, **more}),
    "trak_sparse": lambda **more: Trak(**{"dimension": 6, "projection": "sparse", **more}),
    "logra": lambda **more: Logra(**{"dimension": 2, **more}),
}

OTHERS: dict[str, list[dict[str, Any]]] = {
    "less": [{"batch_size": 4}, {"beta1": 0.5}, {"beta2": 0.5}, {"eps": 0.1}, {"dimension": 7}],
    "less_projected": [{"seed": 1}, {"dimension": 6}, {"batch_size": 2}],
    "trak": [{"seed": 1}, {"dimension": 6}, {"projection": "sign"}],
    "logra": [{"seed": 1}, {"dimension": 3}, {"second_moment": True}],
}
"""Settings that rows depend on."""

SHARED: dict[str, list[dict[str, Any]]] = {
    "less": [{"lr": 0.3}, {"memory_mb": 0.01}],
    "less_projected": [{"lr": 0.3}, {"memory_mb": 0.01}],
    "trak": [{"damping": 0.3}, {"memory_mb": 0.01}, {"projection": "normal"}],
    "logra": [{"damping": 0.3}, {"memory_mb": 0.01}, {"blocks": "whole"}],
}
"""Settings that they don't depend on."""


def run_of(case: Case) -> tuple[FinalModel, Instances, Instances]:
    return case.final_model, case.train, case.test


def moved(case: Case, by: float = 0.1) -> dict[str, Tensor]:
    return {name: t + by for name, t in case.final_model.state().items()}


def model_at(case: Case, state: dict[str, Tensor]) -> FinalModel:
    network = case.final_model.to().network
    network.load_state_dict(state)
    return FinalModel(network, case.final_model.loss, case.final_model.measurement)


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case_name", CASES)
def test_kept_rows_give_the_scores_of_rows_in_memory_and_are_made_once(
    case_name: str, name: str, tmp_path: Path
) -> None:
    """To rounding: products of a file's rows are added up in another order than a block's in memory."""
    case, make = CASES[case_name](), METHODS[name]
    fresh = make().attribute(*run_of(case))
    made = make(cache=str(tmp_path)).attribute(*run_of(case))
    torch.testing.assert_close(made.values, fresh.values)
    assert made.gradient_evaluations >= len(case.train) + len(case.test)
    again = make(cache=str(tmp_path)).attribute(*run_of(case))
    assert torch.equal(again.values, made.values)
    assert again.gradient_evaluations == len(case.test)
    other = make(cache=str(tmp_path)).attribute(case.final_model, case.train, case.test[1:], [5, 0, 9])
    assert other.gradient_evaluations == len(case.test) - 1
    torch.testing.assert_close(other.values, fresh.values[1:, [5, 0, 9]])


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_do_not_fit_are_made_in_blocks_with_the_same_scores(name: str) -> None:
    case, make = CASES["conv_net"](), METHODS[name]
    small = case.final_model.size * 8 * 3 / 2**20  # three gradients, and fewer rows than there are
    torch.testing.assert_close(
        make(memory_mb=small).attribute(*run_of(case)).values, make().attribute(*run_of(case)).values
    )


@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_other_settings_parameters_or_data_are_not_served(name: str, tmp_path: Path) -> None:
    case, make = CASES["mlp_classification"](), METHODS[name]
    make(cache=str(tmp_path)).attribute(*run_of(case))
    targets = case.train.targets.clone()
    targets[3] = 1 - targets[3].clamp(max=1)
    relabelled = Instances(case.train.inputs, targets)
    questions: list[tuple[dict[str, Any], FinalModel, Instances]] = [
        *((other, case.final_model, case.train) for other in OTHERS[name]),
        ({"storage": "float32"}, case.final_model, case.train),
        ({}, model_at(case, moved(case)), case.train),
        ({}, FinalModel(case.final_model.network, smoothed, accept_poor=True), case.train),
        ({}, case.final_model, relabelled),
        ({}, case.final_model, case.train[1:]),
    ]
    for other, model, train in questions:
        fresh = make(**{k: v for k, v in other.items() if k != "storage"}).attribute(model, train, case.test)
        found = make(cache=str(tmp_path), **other).attribute(model, train, case.test)
        tolerance = {"rtol": 1e-3, "atol": 1e-6} if "storage" in other else {}
        torch.testing.assert_close(found.values, fresh.values, **tolerance)
        assert found.gradient_evaluations >= len(train) + len(case.test)


@pytest.mark.parametrize("name", SHARED)
def test_questions_that_rows_do_not_depend_on_read_them(name: str, tmp_path: Path) -> None:
    case, make = CASES["mlp_classification"](), METHODS[name]
    make(cache=str(tmp_path)).attribute(*run_of(case))
    measured = FinalModel(case.final_model.network, case.final_model.loss, measurement="logit_margin")
    for other, model in (*((other, case.final_model) for other in SHARED[name]), ({}, measured)):
        found = make(cache=str(tmp_path), **other).attribute(model, case.train, case.test)
        assert found.gradient_evaluations == len(case.test)
        torch.testing.assert_close(found.values, make(**other).attribute(model, case.train, case.test).values)


def _killed(method: ProjectedRowsMethod, case: Case) -> None:
    write = RowFiles._write

    def dying(self: RowFiles, start: int, rows: Tensor) -> None:
        if start == 8:
            os._exit(9)
        write(self, start, rows)

    RowFiles._write = dying  # type: ignore[method-assign]
    method.keep(case.final_model, case.train)


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_collection_goes_on_after_its_whole_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.store.row_files.EACH", 4)
    case, make = CASES["mlp_classification"](), METHODS[name]
    method = make(cache=str(tmp_path / "a"))
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(method, case))
    process.start()
    process.join()
    assert process.exitcode == 9
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("00000*.safetensors")}
    assert len(first) == 2
    assert method.keep(case.final_model, case.train) == len(case.train) - 8
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert method.keep(case.final_model, case.train) == 0
    whole = make(cache=str(tmp_path / "b"))
    assert whole.keep(case.final_model, case.train) == len(case.train)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.safetensors")}


@pytest.mark.parametrize("name", ["less_projected", "trak"])
def test_parts_of_all_checkpoints_made_apart_are_together_what_one_process_makes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.store.row_files.EACH", 4)
    case = CASES["mlp_regression"]()
    states = {"checkpoints": [moved(case), case.final_model.state()]}
    total = 2 * len(case.train)
    counts = []
    for k in range(3):
        method = METHODS[name](cache=str(tmp_path / str(k)), **states)
        counts.append(method.keep(case.final_model, case.train, (k, 3)))
        for path in (tmp_path / str(k)).rglob("*.safetensors"):
            joined = tmp_path / "joined" / path.relative_to(tmp_path / str(k))
            joined.parent.mkdir(parents=True, exist_ok=True)
            path.rename(joined)
    assert sum(counts) == total
    assert min(counts) > 0
    assert METHODS[name](cache=str(tmp_path / "whole"), **states).keep(case.final_model, case.train) == total
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")
    found = METHODS[name](cache=str(tmp_path / "joined"), **states).attribute(*run_of(case))
    assert found.gradient_evaluations == 2 * len(case.test)
    torch.testing.assert_close(found.values, METHODS[name](**states).attribute(*run_of(case)).values)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("checkpoints", [1, 2])
@pytest.mark.parametrize("case_name", ["mlp_regression", "conv_net"])
@pytest.mark.parametrize("name", ["less", "less_projected", "trak", "trak_of_few_instances"])
def test_the_extremes_are_those_of_all_scores(
    name: str, case_name: str, checkpoints: int, kept: bool, tmp_path: Path
) -> None:
    case = CASES[case_name]()
    states = [case.final_model.state(), moved(case, 0.02)][:checkpoints]
    method = METHODS[name](cache=str(tmp_path) if kept else None, checkpoints=states)
    for left_out in (None, [1, 0, 7, 11, 4, 5, 12]):
        whole = method.attribute(*run_of(case), left_out)
        some = method.attribute(*run_of(case), left_out, extremes=2)
        expected = whole.extremes(2)
        assert some.left_out.tolist() == expected.left_out.tolist()
        assert some.ranks == expected.ranks == 2
        torch.testing.assert_close(some.values, expected.values)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_needs_a_folder_and_a_part_that_there_is(name: str, tmp_path: Path) -> None:
    case = CASES["mlp_regression"]()
    with pytest.raises(InputError, match="cache: expected a folder"):
        METHODS[name]().keep(case.final_model, case.train)
    with pytest.raises(InputError, match="part: expected"):
        METHODS[name](cache=str(tmp_path)).keep(case.final_model, case.train, (3, 3))


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("less_projected", {"adam_steps", "projection", "gradients", "jacobian"}),
        ("trak", {"projection", "gradients", "jacobian", "cotangents"}),
        ("logra", {"layer_projection", "gradients", "jacobian"}),
    ],
)
def test_the_code_that_computes_rows_is_in_their_key(
    name: str, modules: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []
    whole = projected_gradients.projected_key

    def noted(*arguments: Any) -> Any:
        named.extend(arguments[-1])
        return whole(*arguments)

    monkeypatch.setattr(projected_gradients, "projected_key", noted)
    case = CASES["mlp_classification"]()
    METHODS[name](cache=str(tmp_path)).keep(case.final_model, case.train)
    read = PACKAGE_SOURCES.with_imports(named)
    assert {f"fimo.curvature.{module}" for module in modules | {"projected_gradients"}} <= set(read)
