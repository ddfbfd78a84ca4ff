"""Labelled texts: SST-2 and any other table of texts and classes, tokenised once."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fimo.data.cells import is_nested
from fimo.data.datamodule import InstancesModule, Split, held_out
from fimo.data.display import Display
from fimo.data.hub import require_hub
from fimo.data.instances import Instances
from fimo.data.labels import class_indices, read_labels
from fimo.data.origin import Origin, first_line
from fimo.data.parts import parts
from fimo.data.quoting import check_lines
from fimo.data.reading import Form, as_written, check_file
from fimo.data.tokens import Tokens, make_tokens
from fimo.errors import InputError, nearest, shortened

log = logging.getLogger(__name__)

SUFFIXES = (".tsv", ".csv", ".parquet", ".jsonl", ".json")
TEST_NAMES = ("validation", "valid", "dev", "test")
LINES = {".tsv": True, ".csv": True, ".jsonl": False}
"""Files whose rows are lines, and whether the first one names the columns."""

Part = tuple[pd.DataFrame, Origin]


class TextData(InstancesModule):
    """Texts with one class each.

    Instances are ``input_ids`` and ``attention_mask``, ``[n, T]``, padded on the right to the longest text.

    Args:
        path: a folder with ``train.*`` and ``validation.*`` (or ``test.*``), or one file that is split; tsv,
            csv, parquet or jsonl.
        test_path: a second file, which holds the test texts of a file ``path``.
        split: name of a column of a file ``path`` that says which of its texts are the test part.
        hub: name of a data set on the hub, with a configuration after a colon (``glue:sst2``); read where
            ``path`` is None.
        tokenizer: ``bytes``, or a model's folder, package or hub name.
        text, target: columns; ``label`` is an earlier name of ``target``.
        id: column of identifiers; all others are shown beside.
        class_names: the labels, or what labels 0, 1, ... are called; None takes the labels found in the
            training set, in order. Labels that are all numbers are numbers (``01`` is 1, as in a table).
        max_length: most tokens of a text, special ones included; longer texts are cut. None: the model's.
        train_size: training instances, drawn at random; None for all.
        test_size: test instances: a number (the first ones, as in the paper), or the share held out of one
            file that has no test part; None for all.
        split_seed: of the draw and the split.
    """

    def __init__(
        self,
        path: str | None = None,
        hub: str | None = None,
        tokenizer: str | None = None,
        text: str = "text",
        target: str = "label",
        class_names: Sequence[str | int] | None = None,
        max_length: int | None = None,
        train_size: int | None = None,
        test_size: int | float | None = None,
        name: str = "text",
        batch_size: int = 32,
        split_seed: int = 0,
        id: str | None = None,
        test_path: str | None = None,
        split: str | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(name, batch_size)
        for key, value in (("max_length", max_length), ("train_size", train_size), ("test_size", test_size)):
            if value is not None and value <= 0:
                raise InputError(f"dataset.{key}", f"expected a positive number or null but got {value}")
        self.task = "classification"
        self.path, self.hub, self.tokenizer = path, hub, tokenizer
        self.text, self.target, self.id = text, target if label is None else label, id
        self.test_path, self.split = test_path, split
        if test_path is not None and split is not None:
            raise InputError("dataset.split", "expected either dataset.test_path or dataset.split")
        self.max_length, self.train_size, self.test_size = max_length, train_size, test_size
        self.split_seed = split_seed
        self._given_names = tuple(map(str, class_names)) if class_names is not None else None

    def load(self) -> None:
        tokens = make_tokens(self.tokenizer)
        self._vocabulary = tokens.vocabulary
        read = self._read()
        for split, (frame, origin) in zip(("train", "test"), read, strict=True):
            self._check(frame, split, origin)
        (train, known), (test, known_test) = read
        if self.train_size is not None and self.train_size < len(train):
            rows = np.random.default_rng(self.split_seed).choice(len(train), self.train_size, replace=False)
            train, known = train.iloc[np.sort(rows)].reset_index(drop=True), known[np.sort(rows)]
        if isinstance(self.test_size, int):
            test, known_test = test.iloc[: self.test_size], known_test[: self.test_size]
        self.origins = {"train": known, "test": known_test}
        labels = pd.concat([train[self.target], test[self.target]], ignore_index=True)
        self._set_classes(read_labels(labels)[: len(train)])
        self._frames = {"train": train, "test": test}
        texts = [str(t) for frame in (train, test) for t in frame[self.text]]
        inputs = padded(self._cut(tokens, texts), tokens.padding)

        def where(row: int) -> str:
            if row < len(train):
                return f"{known.where(row)} of the train data"
            return f"{known_test.where(row - len(train))} of the test data"

        targets = class_indices(labels, self.class_names, where, numbered=self._given_names is not None)
        everything = Instances(inputs, torch.tensor(targets))
        self.train, self.test = everything[: len(train)], everything[len(train) :]
        self.outputs = len(self.class_names)

    @property
    def inputs(self) -> int:
        """Number of token indices (what a network's embedding must know)."""
        return self._vocabulary

    def table(self) -> pd.DataFrame:
        return self._table

    def display(self, split: Split, index: int) -> Display:
        row = self._frames[split].iloc[index]
        target = int(self._instance(split, index).targets)
        return Display(self.class_names[target], text=str(row[self.text]).strip())

    def _read(self) -> tuple[Part, Part]:
        """Return the training and the test part, each with its origin."""
        divided = self.test_path is not None or self.split is not None
        if isinstance(self.test_size, float) and (divided or self.path is None or Path(self.path).is_dir()):
            problem = f"the data have a test part, of which no share is held out ({self.test_size})"
            raise InputError("dataset.test_size", f"{problem}; expected a number of its texts or null")
        if self.path is None:
            frames = self._from_hub()
            self._table = frames[0]
            return self._with_origin(frames[0], self.hub or ""), self._with_origin(frames[1], self.hub or "")
        path = Path(self.path)
        if not path.is_dir() and self.test_path is not None:
            test_path = Path(self.test_path)
            test = self._with_origin(read_table(test_path, "dataset.test_path"), test_path)
            self._table = read_table(path)
            return self._with_origin(self._table, path), test
        if not path.is_dir():
            whole = self._table = read_table(path)
            if self.split is not None:
                return self._divided(whole, path)
            share = 0.1 if self.test_size is None else self.test_size
            if len(whole) < 4 or share >= len(whole):
                raise InputError("dataset.path", f"{path} has {len(whole)} rows, too few to hold out {share}")
            _, origin = self._with_origin(whole, path)
            self._check(whole, "whole", origin)
            train, test = (
                (whole.iloc[rows].reset_index(drop=True), origin[rows])
                for rows in held_out(len(whole), share, self.split_seed)
            )
            return train, test
        for key, given in (("test_path", self.test_path), ("split", self.split)):
            if given is not None:
                raise InputError(
                    f"dataset.{key}", f"dataset.path={path} is a folder, which has its own parts"
                )
        files = _member(path, ("train",)), _member(path, TEST_NAMES)
        train, test = (self._with_origin(read_table(file), file) for file in files)
        self._table = train[0]
        return train, test

    def _divided(self, whole: pd.DataFrame, path: Path) -> tuple[Part, Part]:
        """Return the parts that a column names."""
        _, origin = self._with_origin(whole, path)
        if self.split not in whole:
            hint = nearest(str(self.split), list(map(str, whole)))
            raise InputError("dataset.split", f"no column {self.split!r} in {path}; {hint}")
        train, test, said = parts(whole[self.split].replace("", None), origin.where)
        self.decisions = (said,)
        log.info("%s", said)
        found = [(whole.iloc[rows].reset_index(drop=True), origin[rows]) for rows in (train, test)]
        return found[0], found[1]

    def _with_origin(self, frame: pd.DataFrame, source: Path | str) -> Part:
        line = None
        if isinstance(source, Path) and source.suffix.lower() in LINES:
            header = LINES[source.suffix.lower()]
            line = first_line(source.read_text("utf-8", errors="replace"), len(frame), header)
        name = source.name if isinstance(source, Path) else source
        return frame, Origin.of_frame(frame, self.id, (self.text, self.target, str(self.split)), name, line)

    def _from_hub(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        if self.hub is None:
            raise InputError(
                "dataset.path", "must be given: a folder with train.* and validation.*, or a file"
            )
        require_hub(f"the data set {self.hub!r}", "dataset.path", "set dataset.path to a local copy")
        from datasets import load_dataset

        name, _, configuration = self.hub.partition(":")
        try:
            found = load_dataset(name, configuration or None)
            test = next(s for s in TEST_NAMES if s in found)
            return found["train"].to_pandas(), found[test].to_pandas()
        except Exception as error:
            raise InputError("dataset.hub", f"{self.hub!r} can't be read ({error})".splitlines()[0]) from None

    def _check(self, frame: pd.DataFrame, split: str, origin: Origin) -> None:
        for key, column in (("text", self.text), ("target", self.target)):
            if column not in frame:
                raise InputError(
                    f"dataset.{key}",
                    f"no column {column!r} in the {split} data; there are {shortened(list(frame.columns))}",
                )
        if frame.empty:
            raise InputError("dataset.path", f"the {split} data have no rows")
        if is_nested(frame[self.text]):
            problem = f"column {self.text!r} of the {split} data holds lists or records, not texts"
            raise InputError("dataset.text", problem)
        for key, column in (("path", self.text), ("target", self.target)):
            blank = frame[column].isna() | (frame[column].astype(str).str.strip() == "")
            if blank.any():
                row = int(np.flatnonzero(blank)[0])
                where = f"{origin.where(row)} of the {split} data"
                raise InputError(f"dataset.{key}", f"the {column} in {where} is empty")

    def _set_classes(self, labels: pd.Series) -> None:
        if self._given_names is not None:
            self.class_names = self._given_names
            return
        found = sorted(labels.unique().tolist())
        if not 2 <= len(found) <= max(2, len(labels) // 2):
            raise InputError("dataset.target", f"column {self.target!r} has {len(found)} classes")
        counts = labels.value_counts()
        if single := [c for c in found if counts[c] == 1]:
            log.warning("dataset.target: labels that one training text has: %s", shortened(single))
        self.class_names = tuple(map(str, found))

    def _cut(self, tokens: Tokens, texts: list[str]) -> list[list[int]]:
        most = min((n for n in (self.max_length, tokens.longest) if n is not None), default=None)
        found = tokens.encode(texts)
        if most is None:
            return found
        long = sum(len(ids) > most for ids in found)
        if long:
            log.warning("%s: %d of %d texts are cut to %d tokens", self.name, long, len(found), most)
        # the last token is kept: it is the special one that ends a text
        return [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in found]


def padded(indices: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, ``[n, T]`` int64, padded on the right to the longest."""
    longest = max(map(len, indices))
    input_ids = torch.full((len(indices), longest), padding)
    attention_mask = torch.zeros(len(indices), longest, dtype=torch.int64)
    for row, ids in enumerate(indices):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def read_table(path: Path, key: str = "dataset.path") -> pd.DataFrame:
    """Read a tsv, csv, parquet or jsonl file; text stays as it is written (``null``, ``007``, ``0.50``).

    Args:
        key: that errors name.

    Raises:
        InputError: no such file, or not a table.
    """
    check_file(path, key)
    suffix = path.suffix.lower()
    try:
        if suffix == ".tsv":  # unquoted by convention: quotation marks are text
            return _lines(path, "\t", key, csv.QUOTE_NONE)
        if suffix == ".csv":
            return _lines(path, ",", key, csv.QUOTE_MINIMAL)
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix in (".jsonl", ".json"):
            return as_written(path, Form(), key)
    except InputError:
        raise
    except Exception as error:  # each reader has its own errors
        raise InputError(key, f"{path} can't be read ({error})".splitlines()[0]) from None
    raise InputError(key, f"expected one of {', '.join(SUFFIXES)} but got {path}")


def _lines(path: Path, separator: str, key: str, quoting: Any) -> pd.DataFrame:
    check_lines(path, path.read_text("utf-8-sig"), separator, key, quoting=quoting)
    frame: pd.DataFrame = pd.read_csv(
        path, sep=separator, quoting=quoting, dtype=str, keep_default_na=False, index_col=False
    )
    return frame


def _member(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        for suffix in SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    raise InputError("dataset.path", f"{folder} holds no {' or '.join(names)} file ({', '.join(SUFFIXES)})")
