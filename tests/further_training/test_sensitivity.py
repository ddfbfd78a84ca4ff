"""The result: adjustment, averaging, and its file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fimo.errors import InputError
from fimo.further_training import Protocol, Sensitivity, further_train
from fimo.further_training import gold_standard as engine
from fimo.further_training.sensitivity import adjust
from tests.cases import CASES


def found(subtract_mean: bool = True) -> Sensitivity:
    case = CASES["mlp_regression"]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=2)
    return further_train(
        case.final_model, case.train, case.test, protocol, [0, 1], [0, 3, [4, 5]],
        test_index=[10, 11, 12, 13, 14], subtract_mean=subtract_mean,
    )  # fmt: skip


def test_the_adjusted_change_has_no_mean_over_left_out_instances_and_averages_seeds() -> None:
    result = found()
    torch.testing.assert_close(result.adjusted.mean(-1), torch.zeros(2, 2, 5), rtol=0, atol=1e-7)
    torch.testing.assert_close(result.sensitivity, adjust(result.raw).mean(0))
    torch.testing.assert_close(found(subtract_mean=False).sensitivity, result.raw.mean(0))


def test_the_file_holds_the_contract_and_reads_back(tmp_path: Path) -> None:
    result = found()
    result.save(tmp_path / "sensitivity.safetensors")
    with safe_open(tmp_path / "sensitivity.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        assert file.get_tensor("raw").dtype == torch.float32
        assert file.get_tensor("sensitivity").dtype == torch.float32
        assert all(
            file.get_tensor(n).dtype == torch.int64 for n in ("step", "epoch", "left_out", "test", "seeds")
        )
    assert shapes["sensitivity"] == (2, 5, 3)
    assert shapes["raw"] == (2, 2, 5, 3)
    assert shapes["groups"] == (3, 2)
    again = Sensitivity.load(tmp_path / "sensitivity.safetensors")
    for field in dataclasses.fields(Sensitivity):
        if isinstance(value := getattr(result, field.name), torch.Tensor):
            assert torch.equal(getattr(again, field.name), value), field.name
    assert result.left_out.tolist() == [0, 3, 4]
    assert result.test.tolist() == [10, 11, 12, 13, 14]
    result.save(tmp_path / "short.safetensors", with_raw=False)
    with safe_open(tmp_path / "short.safetensors", "pt") as file:
        assert "raw" not in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("subtract_mean", [False, True])
def test_a_file_is_read_with_its_own_adjustment_unless_another_is_asked_for(
    subtract_mean: bool, tmp_path: Path
) -> None:
    result = found(subtract_mean)
    result.save(tmp_path / "whole.safetensors")
    result.save(tmp_path / "short.safetensors", with_raw=False)
    for name in ("whole", "short"):
        again = Sensitivity.load(tmp_path / f"{name}.safetensors")
        assert again.subtract_mean == subtract_mean
        torch.testing.assert_close(again.sensitivity, result.sensitivity)
        same = Sensitivity.load(tmp_path / f"{name}.safetensors", subtract_mean)
        assert torch.equal(same.sensitivity, again.sensitivity)
    other = Sensitivity.load(tmp_path / "whole.safetensors", not subtract_mean)
    torch.testing.assert_close(other.sensitivity, found(not subtract_mean).sensitivity)
    with pytest.raises(InputError, match=r"subtract_mean: .*short.safetensors has no raw changes"):
        Sensitivity.load(tmp_path / "short.safetensors", not subtract_mean)


def test_large_results_are_mapped_from_a_file_that_vanishes_with_them(monkeypatch, tmp_path: Path) -> None:
    expected = found()
    monkeypatch.setattr("fimo.data.mapped.MAPPED_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mapped = found()
    assert torch.equal(mapped.raw, expected.raw)
    assert list(tmp_path.iterdir()) == []


def test_epochs_and_steps_of_evaluation_points() -> None:
    assert engine.evaluation_points(Protocol(batch_size=5, epochs=2), 12) == ([3, 6], [1, 2])
    assert engine.evaluation_points(Protocol(batch_size=5, steps=7, evaluate_every=2), 12) == (
        [2, 4, 6, 7],
        [1, 2, 2, 3],
    )
    assert engine.evaluation_points(Protocol(batch_size=5, steps=7), 12) == ([3, 6, 7], [1, 2, 3])
