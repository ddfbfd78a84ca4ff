"""A final model that a run kept in W&B is read back, from the client's own offline files.

Only the server is played: ``wandb.Api`` hands out the files that the offline run's artifact record names.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fimo.app.build import checkpoint_file
from fimo.app.wandb_artifacts import check_name, downloaded
from fimo.errors import InputError
from fimo.live.log import About, Log
from fimo.live.outlet import Outlet
from fimo.live.wandb import WandbLogger
from tests.live.offline_run import read_offline_run

NAME = "wandb:team/fimo/final_model:v0"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keep a checkpoint in an offline run, and play the server that has it; return what it is asked for."""
    import wandb

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    folder = tmp_path / "run"
    log = Log(folder, [Outlet("logger.wandb", WandbLogger(console=False, system_metrics=False))])
    folder.mkdir()
    torch.save({"state_dict": {"weight": torch.arange(3.0)}}, folder / "final_model.ckpt")
    log.begin(About(folder, "kept"))
    log.ended("final_model")
    log.end("finished")
    (artifact,) = read_offline_run(folder).artifacts
    asked: list[str] = []

    class Api:
        def artifact(self, name: str) -> Any:
            asked.append(name)
            if name != f"team/fimo/{artifact.name}:v0":
                raise wandb.errors.CommError(f"artifact {name} not found")
            return SimpleNamespace(download=self.download)

        def download(self, root: str) -> None:
            Path(root).mkdir(parents=True, exist_ok=True)
            for entry in artifact.manifest.contents:
                shutil.copy(entry.local_path, Path(root) / entry.path)

    monkeypatch.setattr(wandb, "Api", Api)
    return asked


def test_a_final_model_that_was_kept_is_read_back_once(server: list[str], tmp_path: Path) -> None:
    config = OmegaConf.create({"model": {"checkpoint": NAME}, "store": str(tmp_path / "store")})
    found = torch.load(checkpoint_file(config), weights_only=True)
    assert found["state_dict"]["weight"].tolist() == [0, 1, 2]
    assert checkpoint_file(config) == checkpoint_file(config)
    assert server == ["team/fimo/final_model:v0"]


def test_the_latest_version_is_asked_for_again(server: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"model\.checkpoint: wandb:team/fimo/final_model:latest: .*not found"
    ):
        downloaded("wandb:team/fimo/final_model:latest", tmp_path)
    assert server == ["team/fimo/final_model:latest"]


@pytest.mark.parametrize("name", ["wandb:final_model", "wandb:a/b/c", "wandb:a/b:v0", "wandb:a/b/c:"])
def test_another_form_of_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected wandb:ENTITY/PROJECT/NAME:VERSION"):
        check_name(name)
