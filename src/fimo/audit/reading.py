"""How rows are read that were given in Python, without a data set that says so."""

from __future__ import annotations

from typing import Any

import pandas as pd
from torch import Tensor

from fimo.audit.explained import Shown
from fimo.data.display import Display
from fimo.data.instances import Instances

MOST = 200
"""Columns of arrays that are rows of a table."""


def shown_rows(source: Any, train: Instances) -> Shown:
    """Return how training rows are read: by the columns of a DataFrame, or as numbered features.

    Args:
        source: what the training instances come from; its cleaned table is the DataFrame, if it is one.
        train: the instances.
    """
    frame = source[0] if isinstance(source, tuple) and len(source) == 2 else source
    table = frame if isinstance(frame, pd.DataFrame) else None
    inputs = train.inputs
    features: pd.DataFrame | None = table
    if table is None and isinstance(inputs, Tensor) and inputs.ndim == 2 and inputs.shape[1] <= MOST:
        features = pd.DataFrame(inputs.detach().cpu().numpy())
        features.columns = [f"feature {k}" for k in features]

    def row(index: int) -> Display:
        target = train.targets[index].flatten()
        values = {} if features is None else {str(c): v for c, v in features.iloc[index].items()}
        return Display(" ".join(f"{v:g}" for v in target[:3].tolist()), values)

    return Shown(row=row, table=None if table is None else lambda: table)
