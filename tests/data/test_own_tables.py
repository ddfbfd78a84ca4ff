"""Tables as people have them: what each column is, what is said of it, and what reaches the network."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler

from fimo.data.csv import CsvData
from fimo.data.datamodule import InstancesModule
from fimo.errors import InputError

N = 200


def houses() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    size = generator.uniform(40, 200, N).round(1)
    days = generator.integers(0, 365, N)
    return pd.DataFrame(
        {
            "house": [f"H{k:03d}" for k in range(N)],
            "size": size,
            "rooms": np.where(np.arange(N) % 9 == 4, np.nan, (size // 25).round()),
            "garden": generator.choice(["yes", "no"], N),
            "quarter": generator.choice(["Old Town", "North", "Harbour"], N),
            "state": np.where(np.arange(N) % 7 == 2, "", generator.choice(["good", "poor"], N)),
            "sold": [f"{d:%d.%m.%Y}" for d in pd.Timestamp("2021-01-01") + pd.to_timedelta(days, "D")],
            "country": "DE",
            "price": (size * 1000 + generator.normal(size=N)).round(2),
        }
    )


def load(
    folder: Path, frame: pd.DataFrame, name: str = "t.csv", write: dict | None = None, **arguments
) -> CsvData:
    frame.to_csv(folder / name, index=False, **(write or {}))
    return loaded(CsvData(str(folder / name), **{"target": "price", **arguments}))


def loaded(data: CsvData) -> CsvData:
    data.setup()
    return data


def rows_of(data: InstancesModule, split: str = "train") -> np.ndarray:
    return data.origin(split).row  # type: ignore[arg-type]


def test_nothing_but_path_and_target_is_needed(tmp_path: Path) -> None:
    frame = houses()
    data = load(tmp_path, frame)
    assert (data.task, data.outputs) == ("regression", 1)
    train, test = train_test_split(np.arange(N), test_size=0.1, random_state=0)
    assert rows_of(data).tolist() == train.tolist()
    assert rows_of(data, "test").tolist() == test.tolist()
    days = (pd.to_datetime(frame["sold"], format="%d.%m.%Y") - pd.Timestamp("1970-01-01")).dt.days
    dates = pd.to_datetime(frame["sold"], format="%d.%m.%Y").dt
    rooms = frame["rooms"].fillna(frame["rooms"].iloc[train].median())
    numbers = np.column_stack([frame["size"], rooms, days, dates.month, dates.day_of_week])
    numbers = StandardScaler().fit(numbers[train]).transform(numbers)
    expected = [
        numbers[:, :3],
        frame["rooms"].isna().to_numpy(float)[:, None],
        numbers[:, 3:],
        (frame["garden"] == "yes").to_numpy(float)[:, None],
        pd.get_dummies(frame["quarter"], dtype=float).to_numpy(),
        pd.get_dummies(frame["state"].replace("", "(empty)"), dtype=float).to_numpy(),
    ]
    for instances, rows in ((data.train, train), (data.test, test)):
        np.testing.assert_allclose(instances.inputs, np.hstack(expected)[rows], rtol=1e-5, atol=1e-5)
    said = "\n".join(data.decisions)
    for line in (
        "price is a number, so this is regression",
        "house has another value in every row",
        "dataset.id=house calls rows by it",
        "country has one value only (DE): set aside",
        "dates, as days since 1970-01-01 with month and weekday: sold",
        "truth values, as 0 and 1: garden",
        "categories, a column of zeros and ones for each value: quarter (3), state (3)",
        f"a column says so: rooms ({frame['rooms'].isna().sum()})",
        f"a category of their own: state ({(frame['state'] == '').sum()})",
    ):
        assert line in said


def test_a_row_is_shown_as_the_file_has_it(tmp_path: Path) -> None:
    data = load(tmp_path, houses(), id="house", drop=["size"])
    shown, row = data.named("test", 3), houses().iloc[rows_of(data, "test")[3]]
    assert shown.id == row["house"]
    assert shown.row is not None
    assert list(shown.row) == ["rooms", "garden", "quarter", "state", "sold", "size", "country"]
    assert (shown.row["quarter"], shown.row["sold"], shown.row["size"]) == (
        row["quarter"],
        row["sold"],
        row["size"],
    )


@pytest.mark.parametrize(
    "name", ["t.csv.gz", "t.tsv.bz2", "t.csv.xz", "t.csv.zip", "t.xlsx", "t.parquet", "t.jsonl"]
)
def test_every_kind_of_file_is_the_same_table(tmp_path: Path, name: str) -> None:
    frame, reference = houses(), load(tmp_path, houses())
    path = tmp_path / name
    if name.endswith(("xlsx", "parquet")):
        getattr(frame, {"x": "to_excel", "p": "to_parquet"}[name[2]])(path, index=False)
    elif name.endswith("jsonl"):
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if "tsv" in name else ",")
    data = loaded(CsvData(str(path), target="price"))
    assert torch.equal(data.train.inputs, reference.train.inputs)  # type: ignore[arg-type]
    assert torch.equal(data.test.targets, reference.test.targets)


def test_decimal_commas_are_seen_and_points_then_separate_thousands(tmp_path: Path) -> None:
    frame = houses()
    frame["plot"] = np.arange(1000, 1000 + 7 * N, 7)
    reference = load(tmp_path, frame)
    german = frame.copy()
    german["size"] = [f"{v:.1f}".replace(".", ",") for v in frame["size"]]
    german["plot"] = [f"{v:,}".replace(",", ".") for v in frame["plot"]]
    german["price"] = [f"{v:,.2f} €".translate(str.maketrans(",.", ".,")) for v in frame["price"]]
    data = load(tmp_path, german, "german.csv", {"sep": ";"})
    assert torch.equal(data.train.inputs, reference.train.inputs)  # type: ignore[arg-type]
    assert torch.equal(data.train.targets, reference.train.targets)
    assert "numbers are read with decimal commas (dataset.decimal)" in data.decisions
    assert data.display("train", 0).target == reference.display("train", 0).target


def test_what_can_not_be_decided_is_one_message_with_all_columns_and_settings(tmp_path: Path) -> None:
    frame = houses()
    frame["seen"] = [f"{k % 12 + 1:02d}/{k % 11 + 1:02d}/2021" for k in range(N)]
    frame["area"] = [f"{1 + k % 9},{k % 1000:03d}" for k in range(N)]
    frame["height"] = frame["size"].astype(str).where(np.arange(N) != 5, "tall")
    with pytest.raises(InputError) as caught:
        load(tmp_path, frame)
    assert caught.value.key == "dataset"
    said = caught.value.problem
    assert "3 columns" in said
    assert "\n" not in said
    for part in (
        "'seen' has dates such as 01/01/2021, with the day or the month first? (dataset.day_first=true",
        "'area' has numbers such as 1,000: is the comma before decimals or thousands? (dataset.decimal=",
        "'height' has 'tall' in data row 5 (line 7) among numbers, 1 such cell (dataset.empty=[tall]",
        "dataset.one_hot=[height]",
        "dataset.drop=[height]",
    ):
        assert part in said
    data = load(tmp_path, frame, day_first=False, decimal=".", empty=["tall"])
    shown = [data.display("train", k).row for k in range(5)]
    assert [row["area"] for row in shown] == [float(f"{1 + r % 9}{r % 1000:03d}") for r in rows_of(data)[:5]]
    thousands = load(tmp_path, frame, day_first=True, decimal=",", drop=["height"])
    assert thousands.display("train", 0).row["area"] < 10


def test_few_levels_some_of_which_are_numbers_are_categories(tmp_path: Path) -> None:
    frame = houses()
    frame["children"] = np.random.default_rng(1).choice(["0", "1", "2", "3+"], N, p=[0.5, 0.2, 0.2, 0.1])
    assert any("children (4)" in line for line in load(tmp_path, frame).decisions)


def test_numbers_of_rows_are_set_aside_in_a_mixed_table_and_noticed_in_one_of_numbers(tmp_path: Path) -> None:
    frame = houses()
    frame["nr"] = np.random.default_rng(3).permutation(N)
    frame["customer_id"] = np.arange(N) ** 2 + 17
    data = load(tmp_path, frame)
    assert {"nr", "customer_id"}.isdisjoint(data.display("train", 0).row)
    assert any(line.startswith("nr numbers the rows: set aside") for line in data.decisions)
    kept = load(tmp_path, frame, keep=["nr"])
    assert kept.inputs == data.inputs + 1
    plain = load(tmp_path, frame[["nr", "size", "price"]], "plain.csv")
    assert plain.inputs == 2
    assert "nr numbers the rows and is a feature; dataset.drop=[nr] leaves it out" in plain.decisions


def test_rare_values_share_a_column_and_new_ones_in_the_test_part_are_said(tmp_path: Path) -> None:
    frame = houses()
    generator = np.random.default_rng(2)
    frame["agent"] = [f"agent {k}" for k in generator.zipf(1.6, N) % 60]
    data = load(tmp_path, frame, max_levels=5)
    few = load(tmp_path, frame.drop(columns="agent"), max_levels=5)
    assert data.inputs == few.inputs + 5
    said = "\n".join(data.decisions)
    assert "rare values that share one column: agent" in said
    levels = frame["agent"].iloc[rows_of(data)].nunique()
    assert f"agent ({levels})" in said
    new = set(frame["agent"].iloc[rows_of(data, "test")]) - set(frame["agent"].iloc[rows_of(data)])
    assert new, "otherwise this test shows nothing"
    assert "agent has values in the test part only" in said
    assert torch.isfinite(data.test.inputs).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "task"),
    [
        (["good", "bad"] * 100, "classification"),
        ([True, False] * 100, "classification"),
        ([1, 2] * 100, "classification"),
        ([k % 5 for k in range(N)], "classification"),
        ([k % 40 for k in range(N)], "regression"),
        ([k / 7 for k in range(N)], "regression"),
    ],
)
def test_the_task_is_seen_from_the_target(tmp_path: Path, target: list, task: str) -> None:
    data = load(tmp_path, houses().assign(price=target))
    assert data.task == task
    assert task in data.decisions[0]


def test_medians_and_categories_are_learnt_from_the_training_part_alone(tmp_path: Path) -> None:
    frame = houses()
    data = load(tmp_path, frame)
    changed = frame.copy()
    test = rows_of(data, "test")
    changed.loc[test, ["size", "rooms"]] = 1e6
    changed.loc[test, "quarter"] = "elsewhere"
    other = load(tmp_path, changed)
    assert torch.equal(data.train.inputs, other.train.inputs)  # type: ignore[arg-type]


def test_a_test_file_and_a_column_of_parts_make_the_same_parts(tmp_path: Path) -> None:
    frame = houses()
    part = np.where(np.arange(N) % 6 == 1, "Holdout", "train")
    by_column = load(tmp_path, frame.assign(part=part), split="part", id="house")
    frame[part == "Holdout"].to_csv(tmp_path / "test.csv", index=False)
    by_file = load(
        tmp_path, frame[part == "train"], "train.csv", test_path=str(tmp_path / "test.csv"), id="house"
    )
    for split in ("train", "test"):
        one, other = getattr(by_column, split), getattr(by_file, split)
        assert torch.equal(one.inputs, other.inputs)
        assert by_column.origin(split).ids == by_file.origin(split).ids
    assert rows_of(by_file, "test").tolist() == list(range((part == "Holdout").sum())), "of its own file"
    assert rows_of(by_column, "test").tolist() == np.flatnonzero(part == "Holdout").tolist()
    assert by_file.origin("test").source == "test.csv"
    assert any(f"{(part == 'Holdout').sum()} test rows (holdout)" in line for line in by_column.decisions)


@pytest.mark.parametrize(
    ("column", "name", "test"),
    [
        (["fit"] * 150 + ["Validation"] * 50, "part", range(150, 200)),
        (["train"] * 100 + ["val"] * 50 + ["test"] * 50, "part", range(150, 200)),
        ([0] * 180 + [1] * 20, "is_test", range(180, 200)),
        ([True] * 180 + [False] * 20, "train", range(180, 200)),
    ],
)
def test_parts_are_called_as_people_call_them(tmp_path: Path, column: list, name: str, test: range) -> None:
    data = load(tmp_path, houses().assign(**{name: column}), split=name)
    assert rows_of(data, "test").tolist() == list(test)
    assert name not in data.named("train", 0).row


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ([0, 1] * 100, "has the values 0, 1; expected train and test"),
        (["train"] * N, "has the values train; expected"),
        (["train", "spring"] * 100, "has the values train, spring; expected"),
        (["train", None] * 100, r"is empty in data row 1 \(line 3\)"),
    ],
)
def test_parts_that_are_none_are_refused(tmp_path: Path, column: list, said: str) -> None:
    with pytest.raises(InputError, match=rf"dataset\.split: column 'part' {said}"):
        load(tmp_path, houses().assign(part=column), split="part")


@pytest.mark.parametrize("part", [{"split": "part"}, {"test_path": "test.csv"}])
def test_a_share_is_not_held_out_of_data_that_have_a_test_part(tmp_path: Path, part: dict) -> None:
    with pytest.raises(InputError, match=r"dataset\.test_size: the data have a test part, .* \(0\.3\)"):
        load(tmp_path, houses(), test_size=0.3, **part)


def test_a_part_without_rows_is_refused(tmp_path: Path) -> None:
    frame = houses().assign(part=["train"] * 190 + ["test"] * 10)
    frame.loc[190:, "rooms"] = np.nan
    with pytest.raises(InputError, match="dataset: the test part has no rows"):
        load(tmp_path, frame, split="part", missing="drop")


def test_classes_of_the_test_part_alone_are_refused_with_their_row(tmp_path: Path) -> None:
    frame = houses().assign(price=["a", "b"] * 100)
    frame.head(20).assign(price=["a"] * 19 + ["c"]).to_csv(tmp_path / "test.csv", index=False)
    said = r"class 'c' in the test part only \(data row 19 \(line 21\) of test\.csv\)"
    with pytest.raises(InputError, match=rf"dataset\.target: .*{said}"):
        load(tmp_path, frame, test_path=str(tmp_path / "test.csv"))


def test_a_test_file_without_a_column_is_refused(tmp_path: Path) -> None:
    houses().rename(columns={"rooms": "room"}).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(InputError, match=r"dataset\.test_path: .* has no column 'rooms'; did you mean room"):
        load(tmp_path, houses(), test_path=str(tmp_path / "test.csv"))
    with pytest.raises(InputError, match=r"dataset\.test_path: is dataset\.path itself"):
        load(tmp_path, houses(), test_path=str(tmp_path / "t.csv"))


def test_empty_cells_may_be_refused_with_all_their_columns(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'rooms' has a missing value \(NaN\) in data row 4 \(line 6\); so have state"
    ):
        load(tmp_path, houses(), missing="refuse")
    dropped = load(tmp_path, houses(), missing="drop")
    frame = houses()
    full = frame["rooms"].notna() & (frame["state"] != "")
    assert sorted([*rows_of(dropped), *rows_of(dropped, "test")]) == np.flatnonzero(full).tolist()


def scaled(frame: pd.DataFrame) -> MinMaxScaler:
    return MinMaxScaler().fit(frame[["size"]].to_numpy())


class OfSize:
    def __init__(self, frame: pd.DataFrame) -> None:
        self.inner = scaled(frame)

    def transform(self, frame: pd.DataFrame) -> np.ndarray:
        return self.inner.transform(frame[["size"]].to_numpy())


def hundreds(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[["size"]] / 100


def leaking(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[["size"]] / frame["size"].max()


def logarithm(target: pd.Series) -> FunctionTransformer:
    return FunctionTransformer(np.log, np.exp).fit(target.to_numpy()[:, None])


def test_preprocessing_of_ones_own_takes_the_place_of_the_tools(tmp_path: Path) -> None:
    frame = houses()
    data = load(tmp_path, frame, transform=OfSize, target_transform=logarithm)
    train = rows_of(data)
    low, high = frame["size"].iloc[train].min(), frame["size"].iloc[train].max()
    for split in ("train", "test"):
        chosen = frame.iloc[rows_of(data, split)]
        expected = ((chosen["size"] - low) / (high - low)).to_numpy()[:, None]
        np.testing.assert_allclose(getattr(data, split).inputs, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(getattr(data, split).targets[:, 0], np.log(chosen["price"]), rtol=1e-6)
    assert float(data.prediction(data.train.targets[0])) == pytest.approx(
        frame["price"].iloc[train[0]], rel=1e-3
    )
    assert data.original(data.train.targets).flatten().tolist() == pytest.approx(
        frame["price"].iloc[train].tolist(), rel=1e-5
    )
    assert data.display("train", 0).row["quarter"] == frame["quarter"].iloc[train[0]]
    as_numbers = load(tmp_path, frame, transform=hundreds)
    np.testing.assert_allclose(as_numbers.train.inputs[:, 0], frame["size"].iloc[train] / 100, rtol=1e-6)


def test_the_guides_own_preprocessing_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "own_table.md").read_text()
    module = re.search(r"```python file=mine.py\n(.*?)```", page, re.DOTALL)
    assert module is not None
    mine: dict = {}
    exec(module[1], mine)
    frame = houses().assign(rooms=houses()["size"] // 25)
    data = load(tmp_path, frame, transform=mine["prepare"], target_transform=mine["price"])
    assert data.inputs == 2 + frame["quarter"].nunique()
    prices = np.log(frame["price"].iloc[rows_of(data, "test")])
    np.testing.assert_allclose(data.test.targets[:, 0], prices, rtol=1e-6)


def test_values_may_be_taken_as_they_are(tmp_path: Path) -> None:
    frame = houses()
    data = load(tmp_path, frame[["size", "rooms", "price"]], standardise=False)
    train = rows_of(data)
    np.testing.assert_allclose(data.train.inputs[:, 0], frame["size"].iloc[train], rtol=1e-6)
    np.testing.assert_allclose(data.train.targets[:, 0], frame["price"].iloc[train], rtol=1e-6)
    assert float(data.prediction(data.train.targets[0])) == pytest.approx(
        frame["price"].iloc[train[0]], rel=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "key", "said"),
    [
        ({"transform": leaking}, "dataset.transform", "gives rows other numbers when other rows"),
        ({"transform": lambda f: f[["quarter"]]}, "dataset.transform", "expected numbers but got DataFrame"),
        ({"transform": lambda f: f[["rooms"]]}, "dataset.transform", "gives nan in column 0 of row 4"),
        ({"transform": lambda f: f["sise"]}, "dataset.transform", "KeyError: 'sise'"),
        ({"transform": lambda f: np.ones(3)}, "dataset.transform", "expected 200 rows of numbers but got"),
        ({"target_transform": np.log}, "dataset.target_transform", "Series has no inverse_transform"),
        (
            {"target_transform": lambda t: FunctionTransformer(np.log, np.log)},
            "dataset.target_transform", "does not return the values that transform was given",
        ),
        ({"split": "part"}, "dataset.split", "no column 'part'"),
        ({"decimal": ";"}, "dataset.decimal", "expected auto, '.' or ','"),
        ({"keep": ["hous"]}, "dataset.keep", "did you mean house"),
    ],
)  # fmt: skip
def test_choices_that_do_not_fit_are_named(tmp_path: Path, arguments: dict, key: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, houses(), **arguments)
    assert caught.value.key == key
    assert said in caught.value.problem


def test_the_file_is_given_back_as_it_is_written(tmp_path: Path) -> None:
    frame = houses().assign(size=[f"{v:.2f}0" for v in houses()["size"]])
    data = load(tmp_path, frame, missing="drop")
    table = data.table()
    assert table["size"].tolist() == frame["size"].tolist()
    assert (table["state"] == "").sum() == (frame["state"] == "").sum()
    row = rows_of(data)[5]
    assert table["quarter"].iloc[row] == data.display("train", 5).row["quarter"]


def test_a_table_of_numbers_is_taken_as_it_always_was(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    frame = pd.DataFrame(generator.normal(size=(80, 4)) * [1, 1e6, 1e-5, 0], columns=list("abcd")).assign(
        e=generator.integers(0, 3, 80), f=np.arange(80), price=generator.normal(size=80)
    )
    data = load(tmp_path, frame)
    train, test = train_test_split(np.arange(80), test_size=0.1, random_state=0)
    values = frame.drop(columns="price").to_numpy()
    deviation = values[train].std(0)
    deviation[deviation == 0] = 1
    expected = torch.tensor((values - values[train].mean(0)) / deviation, dtype=torch.float32)
    assert torch.equal(data.train.inputs, expected[train])  # type: ignore[arg-type]
    assert torch.equal(data.test.inputs, expected[test])  # type: ignore[arg-type]
