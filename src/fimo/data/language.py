"""Text files as passages for a causal language model; test instances are passages or completions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fimo.data.datamodule import InstancesModule, Split, held_out
from fimo.data.display import Display
from fimo.data.instances import IGNORED, Instances
from fimo.data.origin import Origin
from fimo.data.text import read_table
from fimo.data.tokens import BYTES, make_tokens
from fimo.errors import InputError


class LanguageData(InstancesModule):
    """Passages of text files; a position's target is the next token.

    Instances are ``input_ids`` ``[n, T]`` with targets ``[n, T]``, -100 where there is nothing to predict:
    padding on the right, and the prompt of a completion. The data set shifts, not the loss.

    Args:
        path: a folder of ``.txt`` files (searched through), or one file. Blank lines end a passage.
        prompts: a table (tsv, csv, parquet, jsonl) with columns ``prompt`` and ``completion`` as test
            instances, whose loss is the completion's; None holds out passages.
        test_path: a folder or file of passages as test instances.
        tokenizer: ``bytes``, or a model's folder, package or hub name.
        length: most tokens of a passage; longer ones become several.
        test_size: share, or number, of passages held out where ``prompts`` is None.
        split_seed: of the split.
    """

    def __init__(
        self,
        path: str | None = None,
        prompts: str | None = None,
        tokenizer: str | None = None,
        length: int = 128,
        test_size: int | float = 0.1,
        name: str = "language",
        batch_size: int = 16,
        split_seed: int = 0,
        test_path: str | None = None,
    ) -> None:
        super().__init__(name, batch_size)
        if length < 2:
            raise InputError("dataset.length", f"expected at least 2 tokens but got {length}")
        self.task = "language_modelling"
        self.path, self.prompts, self.length, self.test_path = path, prompts, length, test_path
        if prompts is not None and test_path is not None:
            raise InputError("dataset.test_path", "expected either dataset.prompts or dataset.test_path")
        self.tokenizer, self.test_size, self.split_seed = tokenizer or BYTES, test_size, split_seed

    def load(self) -> None:
        self.tokens = make_tokens(self.tokenizer)
        if self.tokens.longest is not None and self.length > self.tokens.longest:
            raise InputError(
                "dataset.length", f"{self.length} tokens are more than the model's {self.tokens.longest}"
            )
        passages = self._passages(self.path, "dataset.path")
        if len(passages) < 4:
            raise InputError(
                "dataset.path", f"{self.path} holds {len(passages)} passages; expected at least 4"
            )
        if self.test_path is not None:
            train, test = passages, self._passages(self.test_path, "dataset.test_path")
            starts = [0] * len(test)
        elif self.prompts is None:
            rows = held_out(len(passages), self.test_size, self.split_seed)
            train, test = ([passages[i] for i in part] for part in rows)
            starts = [0] * len(test)
            whole = Origin.counted(len(passages))
            self.origins = {"train": whole[rows[0]], "test": whole[rows[1]]}
        else:
            train = passages
            test, starts = self._completions(Path(self.prompts))
        self._sources = {"train": train, "test": test}
        self._starts = {"train": [0] * len(train), "test": starts}
        self.train = self._instances([ids for _, ids in train], [0] * len(train))
        self.test = self._instances([ids for _, ids in test], starts)
        self.outputs = self.tokens.vocabulary

    @property
    def inputs(self) -> int:
        """Number of token indices (what a network's embedding must know)."""
        return self.tokens.vocabulary

    def prediction(self, outputs: Tensor) -> str:
        """Return the most likely next token at each position, as text."""
        return self.tokens.decode(outputs.argmax(-1).tolist())

    def display(self, split: Split, index: int) -> Display:
        source, ids = self._sources[split][index]
        start = self._starts[split][index]
        text = self.tokens.decode(ids)
        if not start:
            return Display(source, text=text)
        return Display(self.tokens.decode(ids[start:]), text=self.tokens.decode(ids[:start]) + " ▸ …")

    def _passages(self, given: str | None, key: str) -> list[tuple[str, list[int]]]:
        """Return the passages of a folder or a file, each with its file's name."""
        if given is None:
            raise InputError(key, "must be given: a folder of .txt files, or one file")
        path = Path(given)
        files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
        if not files:
            raise InputError(key, f"no .txt file in {path}")
        return [
            (file.name, piece)
            for file in files
            for text in paragraphs(file)
            for piece in pieces(self.tokens.encode([text])[0], self.length + 1)
        ]

    def _completions(self, path: Path) -> tuple[list[tuple[str, list[int]]], list[int]]:
        table = read_table(path)
        for column in ("prompt", "completion"):
            if column not in table:
                raise InputError("dataset.prompts", f"{path} has no column {column!r}")
            blank = table[column].astype(str).str.strip() == ""
            if blank.any():
                row = int(np.flatnonzero(blank)[0])
                raise InputError("dataset.prompts", f"the {column} in row {row} of {path} is empty")
        if table.empty:
            raise InputError("dataset.prompts", f"{path} has no rows")
        found, starts = [], []
        prompts = self.tokens.encode(table["prompt"].astype(str).tolist(), special=False)
        completions = self.tokens.encode(table["completion"].astype(str).tolist(), special=False)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if len(prompt) + len(completion) > self.length + 1:
                raise InputError(
                    "dataset.prompts",
                    f"row {row} of {path} has {len(prompt) + len(completion)} tokens; "
                    f"dataset.length={self.length}",
                )
            found.append((path.name, [*prompt, *completion]))
            starts.append(len(prompt))
        return found, starts

    def _instances(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Instances:
        longest = max(map(len, sequences)) - 1
        input_ids = torch.full((len(sequences), longest), self.tokens.padding)
        targets = torch.full((len(sequences), longest), IGNORED)
        for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
            input_ids[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            first = max(start - 1, 0)  # position first predicts the token after it
            targets[row, first : len(ids) - 1] = torch.tensor(ids[first + 1 :])
        return Instances({"input_ids": input_ids}, targets)


def paragraphs(file: Path) -> list[str]:
    """Return a file's passages, between blank lines.

    Raises:
        InputError: the file is not UTF-8 text.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("dataset.path", f"{file} is not a UTF-8 text file") from None
    return [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]


def pieces(ids: Sequence[int], length: int) -> list[list[int]]:
    """Cut token indices into pieces of at most ``length``, of about equal size; none of a single token."""
    count = max(1, -(-len(ids) // length))
    found = [list(part) for part in np.array_split(np.asarray(ids), count)]
    return [[int(i) for i in part] for part in found if len(part) > 1]
