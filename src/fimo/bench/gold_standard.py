"""A setting's gold standards as they lie on disk, and as tensors."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from fimo.app.build import build, build_loss, build_measurement
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError, nearest
from fimo.further_training.sensitivity import Sensitivity
from fimo.models.final_model import FinalModel
from fimo.models.frozen import split
from fimo.store.files import read_tensors, write_tensors

FOLDER = Path("outputs/bench")
"""Where gold standards are made, unless told otherwise."""

CARD, README, ABOUT = "card.json", "README.md", "about.json"
DATA, MODEL, SENSITIVITY = "data.safetensors", "model.safetensors", "sensitivity.safetensors"
FINAL_MODEL = "final_model_"
"""Folders of the final models begin with it, and end with their seed."""


def load(name: str, folder: str | Path = FOLDER) -> GoldStandard:
    """Return the gold standards of a setting: what leaving out training instances does to test losses.

    Args:
        name: of the setting, ``concrete/sgd``.
        folder: that ``fimo bench make`` filled, or a copy of it.

    Returns:
        A sequence of final models, each with its data, parameters and sensitivities.

    Raises:
        InputError: the setting is not there.

    Example:
        >>> gold = fimo.bench.load("concrete/sgd")                             # doctest: +SKIP
        >>> gold.sensitivity.shape   # final models, evaluation points, test, left-out instances
        torch.Size([5, 20, 103, 50])
        >>> one = gold[0]
        >>> one.train.inputs, one.train.targets, one.test.inputs, one.left_out, one.network()
    """
    place = Path(folder) / name
    if not (place / CARD).is_file():
        there = made(Path(folder))
        hint = nearest(name, there) if there else f"fimo bench make {name} makes it"
        raise InputError("setting", f"{name!r} is not in {folder}; {hint}")
    return GoldStandard.of(place, name)


def made(folder: Path) -> list[str]:
    """Return the names of the settings whose gold standards are complete."""
    return sorted(card.parent.relative_to(folder).as_posix() for card in folder.glob(f"*/*/{CARD}"))


@dataclass(frozen=True)
class GoldStandard(Sequence["Measured"]):
    """The gold standards of a setting, one for each final model.

    Args:
        name: of the setting.
        folder: that holds them.
        card: what is known of them, as ``card.json`` has it.
        measured: the final models.
    """

    name: str
    folder: Path
    card: Mapping[str, Any]
    measured: tuple[Measured, ...]

    @classmethod
    def of(cls, folder: Path, name: str) -> GoldStandard:
        """Return what a setting's folder holds."""
        card = json.loads((folder / CARD).read_text())
        return cls(name, folder, card, tuple(Measured.of(f) for f in final_model_folders(folder)))

    @overload
    def __getitem__(self, index: int) -> Measured: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Measured, ...]: ...
    def __getitem__(self, index: int | slice) -> Measured | tuple[Measured, ...]:
        return self.measured[index]

    def __len__(self) -> int:
        return len(self.measured)

    def __iter__(self) -> Iterator[Measured]:
        return iter(self.measured)

    @property
    def sensitivity(self) -> Tensor:
        """Of all final models, ``[M, E, J, L]``."""
        return torch.stack([one.truth.sensitivity for one in self])

    @property
    def identity(self) -> str:
        """A hash of all that methods are judged by: another one where anything of it was made anew."""
        text = json.dumps(self.card["files"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Measured:
    """One final model, its data, and how its test losses change without training instances.

    Where only the last layers are trained further (``trainable``), it is of these layers alone, and inputs
    are what enters them: the others compute the same in every run.

    Args:
        folder: that holds it.
        about: what is known of it, as ``about.json`` has it.
    """

    folder: Path
    about: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Measured:
        """Return what a final model's folder holds."""
        return cls(folder, json.loads((folder / ABOUT).read_text()))

    @functools.cached_property
    def truth(self) -> Sensitivity:
        """The gold standard with its axes: ``.sensitivity [E, J, L]``, ``.raw [S, E, J, L]`` …"""
        return Sensitivity.load(self.folder / SENSITIVITY)

    @property
    def sensitivity(self) -> Tensor:
        """The mean change of test losses over seeds, minus its mean over left-out instances ``[E, J, L]``."""
        return self.truth.sensitivity

    @property
    def left_out(self) -> Tensor:
        """Positions ``[L]`` among the training instances."""
        return self.truth.left_out

    @functools.cached_property
    def train(self) -> Instances:
        """All N training instances: ``.inputs``, a tensor or tensors by name, and ``.targets``."""
        return self._data["train"]

    @functools.cached_property
    def test(self) -> Instances:
        """The J test instances whose losses are explained."""
        return self._data["test"]

    @functools.cached_property
    def _data(self) -> dict[str, Instances]:
        shared = self.folder.parent / DATA
        return read_data(shared if shared.exists() else self.folder / DATA)

    @functools.cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The network's parameters and buffers by name (a ``state_dict``)."""
        return read_tensors(self.folder / MODEL)

    def final_model(self) -> FinalModel:
        """Return the final model as fimo takes it.

        Raises:
            InputError: the network can't be built here, such as a pretrained one whose files are missing.
        """
        made_of = self.about["model"]
        network = build(OmegaConf.create(made_of["network"]), "model.network")
        functions = OmegaConf.create({key: made_of[key] for key in ("loss", "measurement")})
        model = FinalModel(
            network,
            build_loss(functions.loss, "model.loss"),
            build_measurement(functions.measurement),
            tuple(made_of["trainable"]),
            accept_poor=True,
        )
        if made_of["trained_part"]:
            parts = split(model.network, model.parameters())
            assert parts is not None  # as when it was made
            model = FinalModel(parts[1], model.loss, model.measurement, tuple(model.parameters()), True)
        model.network.load_state_dict(self.parameters)
        return model

    def network(self) -> nn.Module:
        """Return the network with the final model's parameters, in eval mode; they require gradients."""
        return self.final_model().network.requires_grad_(True)

    @functools.cached_property
    def protocol(self) -> Protocol:
        """Of further training."""
        return Protocol(**self.about["protocol"])

    @property
    def followed_seeds(self) -> list[int]:
        """Seeds that methods follow: none of the gold standard's."""
        return list(self.about["followed_seeds"])


def final_model_folders(folder: Path) -> list[Path]:
    """Return the folders of a setting's final models that are complete, by seed."""
    found = [path.parent for path in folder.glob(f"{FINAL_MODEL}*/{ABOUT}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix(FINAL_MODEL)))


def write_data(path: Path, train: Instances, test: Instances) -> None:
    """Write training and test instances."""
    parts = {"train": train, "test": test}
    write_tensors(path, {f"{part}.{n}": t for part, one in parts.items() for n, t in one.tensors().items()})


def read_data(path: Path) -> dict[str, Instances]:
    """Return what :func:`write_data` wrote, by part."""
    tensors, found = read_tensors(path), {}
    for part in ("train", "test"):
        own = {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
        targets = own.pop("targets")
        found[part] = Instances(own["inputs"] if list(own) == ["inputs"] else own, targets)
    return found


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a setting's files of tensors, by their path within its folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
        if not path.name.startswith(".")
    }
