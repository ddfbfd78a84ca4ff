"""ACS income (Ding et al., 2021): does a person in Massachusetts, 2018, earn more than 50,000 dollars?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fimo.data.origin import Origin
from fimo.data.reading import read_frame
from fimo.data.tabular import Table, TabularModule
from fimo.errors import InputError, shortened

NUMERIC = ("AGEP", "WKHP")
"""Age and hours worked per week: standardised; the rest are codes, one-hot and left as they are."""
CODES = ("COW", "SCHL", "MAR", "OCCP", "POBP", "RELP", "SEX", "RAC1P")
INCOME, WEIGHT, THRESHOLD = "PINCP", "PWGTP", 50_000


class FolktablesData(TabularModule):
    """The ACSIncome task on one state and year.

    Args:
        path: of the census bureau's person file (``psam_p25.csv`` for Massachusetts), or None to fetch it
            with the package ``folktables``, which also names the codes.
        state, year: where ``path`` is None.
    """

    def __init__(
        self,
        path: str | None = None,
        state: str = "MA",
        year: int = 2018,
        name: str = "folktables",
        batch_size: int = 128,
        test_size: float = 0.25,
        split_seed: int = 0,
    ) -> None:
        super().__init__(name, "classification", batch_size, test_size, split_seed)
        self.path, self.state, self.year = path, state, year

    def read(self) -> Table:
        persons = self._from_home() if self.path is None else read_frame(Path(self.path), True, "comma")
        needed = (*NUMERIC, *CODES, INCOME)
        missing = [c for c in needed if c not in persons]
        if missing:
            raise InputError("dataset.path", f"the person file lacks the columns {shortened(missing)}")
        adults = workers(persons)
        if adults.empty:
            raise InputError("dataset.path", "the person file has no adult with work and income")
        hot = one_hot(adults)
        target = pd.Series(np.where(adults[INCOME] > THRESHOLD, "over 50k", "50k or less"), name="income")
        indicators = tuple(str(c) for c in hot if c not in NUMERIC)
        origin = Origin(hot.index.to_numpy(np.int64), source=Path(self.path).name if self.path else "")
        return Table(hot.reset_index(drop=True), target, indicators=indicators, origin=origin)

    def _from_home(self) -> pd.DataFrame:
        try:
            from folktables import ACSDataSource
        except ImportError:
            raise InputError(
                "dataset.path", "not given, and the package folktables, which fetches it, is not installed"
            ) from None
        source = ACSDataSource(survey_year=str(self.year), horizon="1-Year", survey="person")
        try:
            table: pd.DataFrame = source.get_data(states=[self.state], download=True)
            return table
        except Exception as error:  # it raises whatever its reader of web pages does
            raise InputError(
                "dataset.path",
                f"not given, and folktables can't fetch the census file ({type(error).__name__})",
            ) from None


def workers(persons: pd.DataFrame) -> pd.DataFrame:
    """Return the task's rows: older than 16, income above 100, work each week, a weight of at least 1."""
    kept = (persons["AGEP"] > 16) & (persons[INCOME] > 100) & (persons["WKHP"] > 0)
    if WEIGHT in persons:
        kept &= persons[WEIGHT] >= 1
    return persons[kept]


def one_hot(adults: pd.DataFrame) -> pd.DataFrame:
    """Return age and hours, then one column of zeros and ones per code that occurs.

    Args:
        adults: ``[n, ...]`` with the columns ``NUMERIC`` and ``CODES``.
    """
    codes = adults[list(CODES)].astype("Int64").astype("string").astype(object)
    hot = pd.get_dummies(codes, prefix=list(CODES), dtype=float)
    return pd.concat([adults[list(NUMERIC)].astype(float), hot], axis=1)
