"""``effects.csv`` and the sensitivity speak of the rows of the user's own file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import fimo
from fimo.app.effects import ids_of, with_rows, write_effects
from fimo.data.custom import CustomData
from fimo.data.origin import Origin
from fimo.errors import InputError
from fimo.further_training import Sensitivity
from fimo.further_training.sensitivity import adjust
from fimo.scores import Scores
from tests.evaluation.synthetic import synthetic
from tests.test_experiment import run


def data() -> CustomData:
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    found = CustomData((x, x[:, :1]), (x[:9], x[:9, :1]))
    found.setup()
    rows = np.random.default_rng(0).permutation(200)[:100]
    found.origins = {"train": Origin(rows, tuple(f"r{k}" for k in rows)), "test": Origin(np.arange(50, 59))}
    return found


def test_a_line_for_each_pair_with_the_effect_its_error_and_every_score(tmp_path: Path) -> None:
    sensitivity, signal = synthetic()
    sensitivity = with_rows(replace(sensitivity, test=torch.tensor([0, 2, 4, 6, 8])), data())
    follows = Scores(signal.float() + 1, sensitivity.left_out, "follows", predicts_loss_change=True)
    dots = Scores(signal[0].float(), sensitivity.left_out, "dots")
    write_effects(tmp_path / "effects.csv", sensitivity, {"follows": follows, "dots": dots}, data())
    table = pd.read_csv(tmp_path / "effects.csv")
    assert list(table) == [
        "test_row", "test_id", "train_row", "train_id", "effect", "effect_sem", "follows", "dots",
    ]  # fmt: skip
    assert len(table) == 5 * 30
    line = table[(table.test_row == 54) & (table.train_id == data().origin("train").ids[21])].iloc[0]
    assert line.train_row == data().origin("train").row[21]
    assert line.test_id == 54
    changes = sensitivity.raw[:, -1, 2].double()
    changes = (changes - changes.mean(1, keepdim=True))[:, 7]  # left_out[7] is 21
    assert line.effect == pytest.approx(changes.mean().item(), rel=1e-4)
    assert line.effect_sem == pytest.approx(changes.std().item() / 6**0.5, rel=1e-4)
    assert line.dots == pytest.approx(dots.values[2, 7].item(), rel=1e-5)
    assert line.follows == pytest.approx(adjust(follows.values)[-1, 2, 7].item(), rel=1e-5), "as it is judged"


def test_groups_are_called_by_all_their_members() -> None:
    sensitivity, _ = synthetic(left_out=2)
    groups = torch.tensor([[3, 5, -1], [0, 1, 2]])
    sensitivity = with_rows(replace(sensitivity, groups=groups, left_out=groups[:, 0].clone()), data())
    names = data().origin("train")
    assert ids_of(sensitivity, data(), "train") == [
        " ".join(names.ids[k] for k in g) for g in ((3, 5), (0, 1, 2))
    ]
    assert sensitivity.left_out_row is not None
    assert sensitivity.left_out_row.tolist() == names.row[[3, 0]].tolist()


def test_rows_survive_the_file_and_other_files_go_without(tmp_path: Path) -> None:
    plain, _ = synthetic(left_out=6)
    for sensitivity in (plain, with_rows(plain, data())):
        sensitivity.save(tmp_path / "s.safetensors")
        found = Sensitivity.load(tmp_path / "s.safetensors")
        for name in ("left_out_row", "test_row"):
            before, after = getattr(sensitivity, name), getattr(found, name)
            assert (before is None) == (after is None)
            assert before is None or (torch.equal(before, after) and after.dtype == torch.int64)


def test_a_run_speaks_of_the_files_own_names(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(generator.normal(size=(60, 2)).round(3), columns=["size", "age"])
    frame["price"] = frame["size"] * 2 + frame["age"]
    frame["house"] = [f"H{k:02d}" for k in range(60)]
    frame["street"] = [f"street {k}" for k in range(60)]
    path = tmp_path / "houses.csv"
    frame.to_csv(path, index=False)
    asked = ["dataset=csv", f"dataset.path={path}", "dataset.target=price", "dataset.id=house"]
    run(*asked, "dataset.drop=[street]", "+method=graddot", f"hydra.run.dir={tmp_path}/run", folder=tmp_path)
    found = fimo.load_run(tmp_path / "run")
    effects = found.effects
    assert [f"H{row:02d}" for row in effects["train_row"]] == effects["train_id"].tolist()
    assert [f"H{row:02d}" for row in effects["test_row"]] == effects["test_id"].tolist()
    last = found.sensitivity.sensitivity[-1].flatten().tolist()
    assert effects["effect"].tolist() == pytest.approx(last, rel=1e-4, abs=1e-12)
    assert found.sensitivity.left_out_row is not None
    page = (tmp_path / "run" / "report.html").read_text()
    helpful = effects.groupby("train_id")["effect"].mean().idxmax()
    row = int(effects["train_row"][effects["train_id"] == helpful].iloc[0])
    first = page.partition('<div class="side harmful">')[0]
    assert f'data-find="{helpful}"' in first, "the first screen names it"
    assert f"street {row}" in page, "columns that are no features are shown"
    (tmp_path / "run" / "effects.csv").unlink()
    with pytest.raises(InputError, match=r"effects\.csv"):
        _ = fimo.load_run(tmp_path / "run").effects
