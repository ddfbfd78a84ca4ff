"""Where instances came from."""

import numpy as np
import pandas as pd
import pytest

from fimo.data.origin import Origin
from fimo.errors import InputError


def origin() -> Origin:
    return Origin(np.array([4, 0, 9]), ("a", "b", "9"), "t.csv", 2, pd.DataFrame({"street": list("xyz")}))


def test_some_instances_keep_their_names() -> None:
    some = origin()[[2, 0]]
    assert some.row.tolist() == [9, 4]
    assert some.ids == ["9", "a"]
    assert some.beside is not None
    assert some.beside["street"].tolist() == ["z", "x"]


def test_an_instance_is_found_by_its_id_and_else_by_its_row() -> None:
    assert [origin().position(name, "audit.test") for name in ("b", 9, "0")] == [1, 2, 1]
    with pytest.raises(InputError, match=r"audit\.test: there is no id or row 'c'"):
        origin().position("c", "audit.test")


def test_ids_that_occur_twice_are_refused() -> None:
    with pytest.raises(InputError, match=r"dataset\.id: several rows are called"):
        Origin(np.arange(3), ("a", "b", "a"))
