"""UCI Energy Efficiency (Tsanas and Xifara, 2012): 768 simulated buildings, 8 features, heating load."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from fimo.data.origin import Origin
from fimo.data.reading import EXACT, read_frame
from fimo.data.remote import cached_download
from fimo.data.tabular import Table, TabularModule
from fimo.errors import InputError
from fimo.extras import XLS, XLSX, require

HOME = "https://archive.ics.uci.edu/static/public/242/energy+efficiency.zip"
FEATURES = (
    "relative compactness", "surface area", "wall area", "roof area", "overall height", "orientation",
    "glazing area", "glazing area distribution",
)  # fmt: skip
TARGETS = ("heating", "cooling")
AS_TEXT = "or give a text table"


class EnergyData(TabularModule):
    """Heating (or cooling) load of a building; the other load is dropped, as in the paper.

    Args:
        path: of a text table or an Excel sheet with 8 features and then one or both loads (with or without
            a header), or None to fetch the public file.
        target: ``heating`` or ``cooling``; a file with one load only holds the heating load.
    """

    def __init__(
        self,
        path: str | None = None,
        target: str = "heating",
        name: str = "energy",
        batch_size: int = 128,
        test_size: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__(name, "regression", batch_size, test_size, split_seed)
        if target not in TARGETS:
            raise InputError("dataset.target", f"expected heating or cooling but got {target!r}")
        self.path, self.target = path, target

    def read(self) -> Table:
        frame = self._from_home() if self.path is None else read_sheet(Path(self.path))
        frame = frame.dropna(how="all").dropna(axis=1, how="all")  # Excel's blank margin
        origin = Origin(frame.index.to_numpy(np.int64), source=Path(self.path).name if self.path else "")
        frame = frame.reset_index(drop=True)
        allowed = (len(FEATURES) + 1, len(FEATURES) + 2)
        if frame.shape[1] not in allowed:
            raise InputError(
                "dataset.path",
                f"expected {len(FEATURES)} features and one or two loads but got {frame.shape[1]} columns",
            )
        loads = TARGETS[: frame.shape[1] - len(FEATURES)]
        if self.target not in loads:
            raise InputError("dataset.target", f"{self.path} holds the {loads[0]} load only")
        frame.columns = pd.Index([*FEATURES, *loads])
        target = frame[self.target].rename(f"{self.target} load")
        return Table(frame[list(FEATURES)], target, unit="kWh/m²", origin=origin)

    def _from_home(self) -> pd.DataFrame:
        require("dataset.path", XLSX, AS_TEXT)
        archive = zipfile.ZipFile(cached_download(HOME, "energy.zip"))
        member = next(n for n in archive.namelist() if n.lower().endswith((".xlsx", ".csv")))
        return (
            _excel(archive.open(member))
            if member.endswith("x")
            else pd.read_csv(archive.open(member), **EXACT)
        )


def read_sheet(path: Path) -> pd.DataFrame:
    """Read an Excel sheet by its suffix, else a text table."""
    if path.suffix.lower() in (".xls", ".xlsx") and path.is_file():
        require("dataset.path", XLS if path.suffix.lower() == ".xls" else XLSX, AS_TEXT)
        return _excel(path)
    return read_frame(path, None, "auto")


def _excel(source: Path | IO[bytes]) -> pd.DataFrame:
    try:
        return pd.read_excel(source)
    except Exception as error:  # a damaged sheet fails in many ways inside its readers
        raise InputError("dataset.path", f"not an Excel sheet ({type(error).__name__})") from None
