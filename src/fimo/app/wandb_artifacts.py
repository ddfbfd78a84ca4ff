"""Checkpoints that are artifacts of Weights & Biases: ``wandb:ENTITY/PROJECT/NAME:VERSION``."""

from __future__ import annotations

import re
from pathlib import Path

from fimo.errors import InputError, reason

WANDB = "wandb:"
FORM = re.compile(r"wandb:[^/:\s]+/[^/:\s]+/[^/:\s]+:[^/:\s]+")
ENDINGS = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")


def check_name(name: str) -> None:
    """Refuse what has not the form of an artifact's name.

    Raises:
        InputError: naming the form.
    """
    if not FORM.fullmatch(name):
        raise InputError("model.checkpoint", f"expected wandb:ENTITY/PROJECT/NAME:VERSION but got {name}")


def downloaded(name: str, folder: Path) -> Path:
    """Return the checkpoint of an artifact, fetched unless a fixed version of it (``v3``) was before.

    Args:
        folder: for artifacts.

    Raises:
        InputError: there is none of that name, no connection, no login, or not one checkpoint in it.
    """
    check_name(name)
    place = folder / re.sub(r"[/:]", "-", name.removeprefix(WANDB))
    fixed = re.fullmatch(r"v\d+", name.rpartition(":")[2]) is not None
    if not (fixed and checkpoints(place)):
        import wandb

        try:
            wandb.Api().artifact(name.removeprefix(WANDB)).download(root=str(place))
        except Exception as error:
            raise InputError("model.checkpoint", f"{name}: {reason(error)}") from error
    found = checkpoints(place)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(
            "model.checkpoint", f"{name}: expected one file {'|'.join(ENDINGS)} but found {names}"
        )
    return found[0]


def checkpoints(folder: Path) -> list[Path]:
    """Return the files of a folder that may be checkpoints."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix in ENDINGS]
