"""The content-addressed store: results under a name derived from all that produced them.

A key is a JSON-able description of everything that a result depends on; its hash names a folder, which
holds ``key.json`` beside the results. A changed description is another folder, so results of different
configurations never mix. Every file is written aside, flushed and renamed, so a reader sees a whole file
or none, whatever was killed and when.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fimo.errors import InputError, shortened
from fimo.store import VERSION


class Store:
    """A folder of results, shared by runs and by processes.

    Args:
        root: the store's folder; made when first written to.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def folder(self, kind: str, key: Mapping[str, Any], about: str = "") -> Path:
        """Return the folder of one result, made if needed, with its description in ``key.json``.

        Args:
            about: the result in words, for people; no part of its name.

        Raises:
            InputError: naming ``store``: something else than folders is in the way.
            OSError: the disk is full or not writable.
        """
        full = {"version": VERSION, **key}
        text = json.dumps(full, sort_keys=True)
        folder = self.root / kind / hashlib.sha256(text.encode()).hexdigest()[:24]
        try:
            os.utime(folder / "key.json")  # when it was used last, for pruning
        except OSError:
            if (folder / "key.json").exists():  # of a store that is only read
                return folder
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise InputError("store", f"expected a folder but {error.filename} is none") from error
            with written_aside(folder / "key.json") as path:
                path.write_text(json.dumps({"about": about, "key": full}, sort_keys=True, indent=1))
        return folder


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it to ``path``.

    Raises:
        OSError: of ``path``: the disk is full or not writable; nothing is left behind.
    """
    # not by tempfile, whose files only their owner may read
    aside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # the usual permissions, whatever the body's writer would set
        yield aside
        aside.chmod(mode)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:  # writing names no file, or the temporary one
        if error.errno is None or (error.filename is not None and str(error.filename) != str(aside)):
            raise
        raise could_not_write(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors to a safetensors file, whole or not at all.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # cloned, since safetensors refuses tensors that share memory, as tied weights do
    contents = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with written_aside(path) as aside:
        try:
            save_file(contents, aside, dict(metadata) if metadata else None)
        except Exception as error:  # safetensors reports a full disk as its own error
            raise could_not_write(path, error) from error


def could_not_write(path: Path, error: Exception) -> OSError:
    """Return a writer's error as one that says which file, and why where the system said so."""
    number = re.search(r"os error (\d+)", str(error))  # as Rust puts it
    code = int(number[1]) if number else getattr(error, "errno", None)
    if code is None:
        return OSError(f"{path}: could not be written ({error})")
    return OSError(code, os.strerror(code), str(path))


def read_as(path: Path, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a user's safetensors file.

    Args:
        names: of tensors that it must have.

    Raises:
        InputError: with the path: there is none, it can't be read, is of another kind or lacks a tensor.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = read_tensors(path)
    except FileNotFoundError:
        raise InputError(str(path), "there is no such file") from None
    except OSError as error:  # a folder
        raise InputError(str(path), f"can't be read: {error}") from None
    except SafetensorError as error:
        raise InputError(str(path), f"is no safetensors file ({error})") from None
    for name in names:
        if name not in tensors:
            raise InputError(str(path), f"holds no tensor {name!r}; there are {shortened(sorted(tensors))}")
    return tensors, metadata


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file as a dict of tensors."""
    return load_file(path, device=str(device))
