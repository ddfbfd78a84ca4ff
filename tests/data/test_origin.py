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
    assert [origin().position(name, "audit.test") for name in ("b", 9, "row 0")] == [1, 2, 1]
    with pytest.raises(InputError, match=r"audit\.test: there is no id or row 'c'"):
        origin().position("c", "audit.test")


def test_a_number_is_an_id_where_ids_are_numbers_and_else_a_row(caplog: pytest.LogCaptureFixture) -> None:
    numbered = Origin(np.array([11, 12]), ("12", "13"))
    with pytest.raises(
        InputError, match=r"there is no id 11; there are 12, 13; data row 11 is called 'row 11'"
    ):
        numbered.position(11, "audit.test")
    assert [numbered.position(name, "audit.test") for name in (12, "row 12", "row 11")] == [0, 1, 0]
    worded = Origin(np.array([11, 12]), ("a", "b"))
    caplog.clear()
    with caplog.at_level("INFO"):
        assert [worded.position(name, "audit.test") for name in (12, "11", "row 12")] == [1, 0, 1]
    assert "audit.test: data row 12 is called b" in caplog.text
    assert [Origin(np.array([11, 12])).position(name, "audit.test") for name in (12, "row 11")] == [1, 0]


def test_ids_that_occur_twice_are_refused() -> None:
    with pytest.raises(InputError, match=r"dataset\.id: several rows are called"):
        Origin(np.arange(3), ("a", "b", "a"))
