"""Images, texts and language models on the whole path, tiny: final model, gold standard, scores, report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from fimo.app.config import validated
from fimo.app.search_path import SearchPath
from tests.models.folders import save_bert

CONF = Path(__file__).parents[1] / "conf"
PLACES = SearchPath((CONF,))


def images(folder: Path) -> list[str]:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = generator.integers(100 * c, 100 * c + 120, (8, 8, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / split / name / f"{k}.png")
    return [
        "dataset=images", f"dataset.path={folder}", "model=resnet9", "model.network.width=2",
        "model.trainable=[layer3*,head*]",
    ]  # fmt: skip


def texts(folder: Path) -> list[str]:
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_bert(folder / "model")
    rows = [f"{'a good bright film' if k % 2 else 'the very dull film'}\t{k % 2}" for k in range(12)]
    for name in ("train", "validation"):
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]))
    return [
        "dataset=text", f"dataset.path={folder}", "dataset.test_size=4", "model=bert",
        f"model.network.path={folder}/model", "model.trainable=[head*]", "further_training=adam",
    ]  # fmt: skip


def passages(folder: Path) -> list[str]:
    pytest.importorskip("transformers", reason="transformers is not installed")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("\n\n".join(f"line {k} of text" for k in range(12)))
    (folder / "prompts.tsv").write_text("prompt\tcompletion\nline 3 of\t text\nline\t 5\nli\tne\n")
    return [
        "dataset=language", f"dataset.path={folder}/texts", f"dataset.prompts={folder}/prompts.tsv",
        "model=causal_lm", "model.network.width=8", "model.network.layers=1", "model.network.heads=2",
    ]  # fmt: skip


SHOWN = {images: "data:image/png;base64,", texts: "the very dull film", passages: "line 3 of"}


@pytest.mark.parametrize("make", SHOWN, ids=lambda make: make.__name__)
def test_each_modality_runs_from_files_to_a_report_that_shows_its_instances(
    make: object, tmp_path: Path
) -> None:
    from fimo.app.experiment import run_experiment

    (tmp_path / "data").mkdir()
    overrides = [
        *make(tmp_path / "data"),  # type: ignore[operator]
        "+method=[graddot,datainf]", "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
        "further_training.leave_out=mask", "further_training.epochs=1", "further_training.seeds=2",
        "further_training.left_out=3", "further_training.batch_size=4", "evaluation.bootstrap=0",
        "logger=none", "model.accept_poor=true", f"store={tmp_path}/store",
    ]  # fmt: skip
    threads = torch.get_num_threads()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = validated(compose("config", overrides=[*overrides, f"threads={threads}"]), PLACES)
    (tmp_path / "run").mkdir()
    run_experiment(config, tmp_path / "run")
    raw = load_file(tmp_path / "run" / "sensitivity.safetensors")["raw"]
    assert torch.isfinite(raw).all()
    assert raw.abs().max() > 0
    scores = load_file(tmp_path / "run" / "scores" / "datainf.safetensors")["scores"]
    assert scores.shape == raw.shape[2:]
    assert SHOWN[make] in (tmp_path / "run" / "report.html").read_text()  # type: ignore[index]
