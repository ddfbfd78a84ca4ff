"""UCI Concrete Compressive Strength (Yeh, 1998): 1,030 mixes, 8 features, strength in MPa."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pandas as pd

from fimo.data.reading import read_frame
from fimo.data.remote import cached_download
from fimo.data.tabular import Table, TabularModule, pick_target
from fimo.errors import InputError
from fimo.extras import XLS, require

HOME = "https://archive.ics.uci.edu/static/public/165/concrete+compressive+strength.zip"
COLUMNS = (
    "cement", "slag", "fly ash", "water", "superplasticizer", "coarse aggregate", "fine aggregate", "age",
    "strength",
)  # fmt: skip


class ConcreteData(TabularModule):
    """Compressive strength of concrete; the last column is the target.

    Args:
        path: of a text table (with or without a header), or None to fetch the public file.
    """

    def __init__(
        self,
        path: str | None = None,
        name: str = "concrete",
        batch_size: int = 128,
        test_size: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__(name, "regression", batch_size, test_size, split_seed)
        self.path = path

    def read(self) -> Table:
        frame = self._from_home() if self.path is None else read_frame(Path(self.path), None, "auto")
        if frame.shape[1] != len(COLUMNS):
            raise InputError("dataset.path", f"expected {len(COLUMNS)} columns but got {frame.shape[1]}")
        frame.columns = pd.Index(COLUMNS)
        return Table(*pick_target(frame, -1), unit="MPa")

    def _from_home(self) -> pd.DataFrame:
        require("dataset.path", XLS, "or give a text table")
        archive = zipfile.ZipFile(cached_download(HOME, "concrete.zip"))
        member = next(n for n in archive.namelist() if n.lower().endswith(".xls"))
        return pd.read_excel(archive.open(member))
