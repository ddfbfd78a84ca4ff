import importlib
import logging

import pytest
from omegaconf import OmegaConf

from fimo.app.moved import MOVED, present, with_present_paths


def test_a_path_of_the_version_before_works_with_a_warning_that_names_its_key(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = {"_target_": "fimo.models.custom.Adapted", "parts": [{"_target_": "torch.nn.ReLU"}]}
    config = OmegaConf.create(
        {"model": {"network": network, "checkpoint": None, "loss": "mse"}}
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        with_present_paths(config)
    assert config.model.network._target_ == "fimo.models.adapted.Adapted"
    assert config.model.network.parts[0]._target_ == "torch.nn.ReLU"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("model.network._target_: fimo.models.custom.Adapted is now")


@pytest.mark.parametrize("module", sorted(set(MOVED.values())))
def test_what_moved_is_there(module: str) -> None:
    importlib.import_module(module)


def test_other_paths_stay() -> None:
    assert present("fimo.models.mlp.mlp") == "fimo.models.mlp.mlp"
    assert present("mine.custom.Net") == "mine.custom.Net"
