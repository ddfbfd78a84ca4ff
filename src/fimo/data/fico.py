"""The FICO challenge's home equity lines of credit: 9,871 usable rows, 23 features, Good or Bad risk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fimo.data.origin import Origin
from fimo.data.reading import read_frame
from fimo.data.tabular import Table, TabularModule
from fimo.data.target import check_numeric
from fimo.errors import InputError, shortened

TARGET = "RiskPerformance"
FEATURES = (
    "ExternalRiskEstimate", "MSinceOldestTradeOpen", "MSinceMostRecentTradeOpen", "AverageMInFile",
    "NumSatisfactoryTrades", "NumTrades60Ever2DerogPubRec", "NumTrades90Ever2DerogPubRec",
    "PercentTradesNeverDelq", "MSinceMostRecentDelq", "MaxDelq2PublicRecLast12M", "MaxDelqEver",
    "NumTotalTrades", "NumTradesOpeninLast12M", "PercentInstallTrades", "MSinceMostRecentInqexcl7days",
    "NumInqLast6M", "NumInqLast6Mexcl7days", "NetFractionRevolvingBurden", "NetFractionInstallBurden",
    "NumRevolvingTradesWBalance", "NumInstallTradesWBalance", "NumBank2NatlTradesWHighUtilization",
    "PercentTradesWBalance",
)  # fmt: skip


class FicoData(TabularModule):
    """Risk of a line of credit, prepared as the paper does (see :func:`without_special_codes`).

    Args:
        path: of the table: ``RiskPerformance`` and the 23 features, named by a header, or in the original
            order without one. FICO gives the file out on request, so it is never fetched.
    """

    def __init__(
        self,
        path: str | None = None,
        name: str = "fico",
        batch_size: int = 128,
        test_size: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__(name, "classification", batch_size, test_size, split_seed)
        self.path = path

    def read(self) -> Table:
        if self.path is None:
            raise InputError("dataset.path", "must be given: FICO gives its HELOC table out on request only")
        frame = _read(Path(self.path))
        check_numeric(frame[list(FEATURES)])
        features = without_special_codes(frame[list(FEATURES)].astype(float))
        target = frame[TARGET].loc[features.index]
        origin = Origin(features.index.to_numpy(np.int64), source=Path(self.path).name)
        return Table(features.reset_index(drop=True), target.reset_index(drop=True), origin=origin)


def without_special_codes(features: pd.DataFrame) -> pd.DataFrame:
    """Drop and fill the special codes -9 (no record), -8 (no usable trades) and -7 (condition not met).

    As in the paper: rows with nothing above -9 are dropped (the index tells which were kept). A most recent
    delinquency of -7 is longer ago than any (the largest value + 1), of -8 the mean; a most recent inquiry of
    -7 is within a week (0), of -8 longer ago than any (the largest + 1); a worst delinquency above 7 means
    "never" (7). What is left of -8 and -9 becomes the column's mean. Means are over non-negative values of
    all rows, training and test.

    Args:
        features: ``[n, 23]`` with the columns ``FEATURES``.
    """
    kept = features[(features > -9).any(axis=1)].copy()
    delinquency, inquiry = kept["MSinceMostRecentDelq"], kept["MSinceMostRecentInqexcl7days"]
    kept["MSinceMostRecentDelq"] = delinquency.replace(
        {-7: delinquency.max() + 1, -8: delinquency[delinquency >= 0].mean()}
    )
    kept["MSinceMostRecentInqexcl7days"] = inquiry.replace({-7: 0, -8: inquiry.max() + 1})
    kept["MaxDelq2PublicRecLast12M"] = kept["MaxDelq2PublicRecLast12M"].clip(upper=7)
    means = kept[kept >= 0].mean()
    return kept.mask(kept.isin([-8, -9]), means, axis=1)


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError("dataset.path", f"no such file: {path}")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = TARGET in file.readline()
    frame = read_frame(path, header, "auto")
    if not header:
        if frame.shape[1] != len(FEATURES) + 1:
            raise InputError(
                "dataset.path",
                f"{path} has no header and {frame.shape[1]} columns; expected {TARGET} and {len(FEATURES)}",
            )
        frame.columns = pd.Index([TARGET, *FEATURES])
    missing = [c for c in (TARGET, *FEATURES) if c not in frame]
    if missing:
        raise InputError("dataset.path", f"{path} lacks the columns {shortened(missing)}")
    return frame
