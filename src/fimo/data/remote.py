"""Files from a data set's public home, kept in a local cache."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from fimo.errors import InputError
from fimo.store.files import written_aside


def cached_download(url: str, name: str, timeout: float = 15.0) -> Path:
    """Return the local copy of a public file, downloaded on first use.

    The cache is ``$FIMO_CACHE``, else ``~/.cache/fimo``.

    Raises:
        InputError: naming ``dataset.path``: the file can't be fetched (offline, moved).
    """
    folder = Path(os.environ.get("FIMO_CACHE", Path.home() / ".cache" / "fimo"))
    path = folder / name
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            "dataset.path",
            f"not given, and {url} can't be fetched ({reason}); download it and set dataset.path=FILE",
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_bytes(content)
    return path
