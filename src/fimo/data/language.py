"""Passages, and prompts with completions, for a causal language model: text files and tables."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fimo.data.datamodule import InstancesModule, Split, held_out
from fimo.data.display import Display
from fimo.data.instances import IGNORED, Instances
from fimo.data.origin import Origin
from fimo.data.passages import Columns, Passages, Tokenised, read_passages
from fimo.data.tokens import BYTES, WITHOUT_TEXT, WordTokens, make_tokens
from fimo.errors import InputError

log = logging.getLogger(__name__)

EXPLAINED = ("instance", "token")


class LanguageData(InstancesModule):
    """Passages, or prompts with completions; a position's target is the next token.

    Instances are ``input_ids`` ``[n, T]`` with targets ``[n, T]``, -100 where there is nothing to predict:
    padding on the right, and prompts. The data set shifts, not the loss. A passage's first token is not
    predicted. Prompts and completions become tokens apart from each other, without special ones.

    Args:
        path: a folder of ``.txt`` files (searched through) or one text file, where blank lines end a passage;
            or a table (tsv, csv, parquet, jsonl) with a column ``text``, or ``prompt`` and ``completion``.
        prompts: a table of prompts and completions as test instances; None holds out passages.
        test_path: a folder, file or table of test instances.
        tokenizer: ``bytes``, ``words`` (of all texts of ``path``), or a model's folder, package or hub name.
        vocabulary: most words of ``words``, the most frequent; None for all.
        length: most tokens that are predicted of a passage; longer ones become several.
        explain: ``instance``, or ``token``: each token of a test instance is one of its own. An instance's
            loss is the mean of its tokens', and so are its sensitivities and the scores of methods that are
            linear in the test loss.
        test_size: share, or number, of passages held out where no test instances are given.
        split_seed: of the split.
        text, prompt, completion, id: names of columns.
        fact: a column that says which fact a passage states, or a test instance asks for; see
            :class:`fimo.tasks.FactTracing`.
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
        vocabulary: int | None = None,
        explain: str = "instance",
        text: str = "text",
        prompt: str = "prompt",
        completion: str = "completion",
        id: str | None = None,
        fact: str | None = None,
    ) -> None:
        super().__init__(name, batch_size)
        if length < 2:
            raise InputError("dataset.length", f"expected at least 2 tokens but got {length}")
        if explain not in EXPLAINED:
            raise InputError("dataset.explain", f"expected instance or token but got {explain!r}")
        self.task = "language_modelling"
        self.path, self.prompts, self.length, self.test_path = path, prompts, length, test_path
        if prompts is not None and test_path is not None:
            raise InputError("dataset.test_path", "expected either dataset.prompts or dataset.test_path")
        self.tokenizer, self.test_size, self.split_seed = tokenizer or BYTES, test_size, split_seed
        self.vocabulary, self.explain = vocabulary, explain
        self.columns = Columns(text, prompt, completion, id, fact)

    def load(self) -> None:
        written, test_written = self.read()
        self.tokens = make_tokens(self.tokenizer, [*written.prompts, *written.texts], self.vocabulary)
        if self.tokens.longest is not None and self.length > self.tokens.longest:
            raise InputError(
                "dataset.length", f"{self.length} tokens are more than the model's {self.tokens.longest}"
            )
        train = written.cut(self.tokens, self.length + 1)
        if test_written is None:
            if len(train) < 4:
                raise InputError(
                    "dataset.path", f"{self.path} holds {len(train)} passages; expected at least 4"
                )
            wholes = np.unique(train.whole)
            rows = held_out(len(wholes), self.test_size, self.split_seed)
            train, test = (train.of(wholes[part]) for part in rows)
        else:
            test = test_written.cut(self.tokens, self.length + 1)
        self._check(train, test)
        self._tokenised: dict[Split, Tokenised] = {"train": train, "test": test}
        self.origins = {"train": train.passages.origin, "test": test.passages.origin}
        width = max(len(ids) for part in (train, test) for ids in part.ids) - 1  # some methods join the parts
        self.train, self.test = (shifted(part, self.tokens.padding, width) for part in (train, test))
        self._token: list[tuple[int, int]] | None = None
        if self.explain == "token":
            self._explain_tokens()
        self.outputs = self.tokens.vocabulary

    def read(self) -> tuple[Passages, Passages | None]:
        """Return what is trained on, and the test instances; None where they are held out of it."""
        train = read_passages(self.path, "dataset.path", self.columns)
        if self.prompts is not None:
            return train, read_passages(self.prompts, "dataset.prompts", self.columns, prompts=True)
        if self.test_path is not None:
            return train, read_passages(self.test_path, "dataset.test_path", self.columns)
        return train, None

    @property
    def inputs(self) -> int:
        """Number of token indices (what a network's embedding must know)."""
        return self.tokens.vocabulary

    def table(self) -> pd.DataFrame:
        return self._tokenised["train"].passages.frame

    def facts(self, split: Split) -> list[str] | None:
        """Return which fact each instance of a part states or asks for, empty for none.

        None where no column says it.
        """
        facts = self._tokenised[split].passages.facts
        if facts is None:
            return None
        count = len(getattr(self, split))
        return [facts[self._place(split, self._loaded_index(split, k))[0]] for k in range(count)]

    def texts(self, split: Split) -> list[str]:
        """Return each instance of a part as it is written, a prompt with its completion."""
        written = self._tokenised[split].passages
        rows = [self._place(split, self._loaded_index(split, k))[0] for k in range(len(getattr(self, split)))]
        return [f"{written.prompts[row]} {written.texts[row]}".strip() for row in rows]

    def predicted(self, split: Split, index: int, outputs: Tensor) -> str:
        """Return a completion by the most likely tokens; of a passage, how many of its tokens these are."""
        targets = getattr(self, split).targets[index]
        kept = targets != IGNORED
        best = outputs.argmax(-1)[kept]
        if self._place(split, self._loaded_index(split, index))[1]:
            return self.tokens.decode(best.tolist()).strip()
        right = int((best == targets[kept]).sum())
        return f"{right} of {int(kept.sum())} tokens right"

    def prediction(self, outputs: Tensor) -> str:
        """Return the most likely next token at each position, as text."""
        return self.tokens.decode(outputs.argmax(-1).tolist())

    def display(self, split: Split, index: int) -> Display:
        row, start, stop = self._place(split, index)
        part = self._tokenised[split]
        before, after = (self.tokens.decode(part.ids[row][k]) for k in (slice(start), slice(start, stop)))
        if not start:
            return Display(part.passages.source(row), text=after)
        return Display(after.strip() or WITHOUT_TEXT, text=f"{before} ▸ …")

    def pieces(self, split: Split, index: int) -> tuple[str, ...]:
        row, _, stop = self._place(split, self._loaded_index(split, index))
        return tuple(self.tokens.pieces(self._tokenised[split].ids[row][:stop]))

    def _place(self, split: Split, index: int) -> tuple[int, int, int | None]:
        """Return which passage an instance that was loaded is, and from where to where it is predicted."""
        if split == "test" and self._token is not None:
            row, position = self._token[index]
            return row, position, position + 1
        return index, self._tokenised[split].starts[index], None

    def _check(self, train: Tokenised, test: Tokenised) -> None:
        for part, key in ((train, "path"), (test, "test_path" if self.prompts is None else "prompts")):
            if not len(part):
                raise InputError(f"dataset.{key}", "no passage has two tokens, one to predict")
        decisions = []
        if len(train) + len(test) > len(np.unique(train.whole)) + len(np.unique(test.whole)):
            decisions.append(f"passages of more than {self.length} tokens are several instances")
        if isinstance(self.tokens, WordTokens):
            unknown = sum(self.tokens.unknown in ids for ids in test.ids)
            if unknown:
                decisions.append(f"{unknown} of {len(test)} test instances hold unknown words")
        self.decisions = tuple(decisions)
        for line in decisions:
            log.info("%s", line)

    def _explain_tokens(self) -> None:
        """Make each predicted token of the test instances an instance."""
        self.test, where = by_token(self.test)
        self._token = [(j, position + 1) for j, position in where]
        names = self.origins["test"].ids
        ids = tuple(f"{names[j]}:{position}" for j, position in self._token)
        self.origins = {**self.origins, "test": replace(Origin.counted(len(ids)), id=ids)}


def shifted(passages: Tokenised, padding: int, width: int) -> Instances:
    """Return passages as instances ``[n, width]``: input t is followed by target t, -100 within prompts."""
    input_ids = torch.full((len(passages), width), padding)
    targets = torch.full((len(passages), width), IGNORED)
    for row, (ids, start) in enumerate(zip(passages.ids, passages.starts, strict=True)):
        input_ids[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        first = max(start - 1, 0)  # position first predicts the token after it
        targets[row, first : len(ids) - 1] = torch.tensor(ids[first + 1 :])
    return Instances({"input_ids": input_ids}, targets)


def by_token(instances: Instances) -> tuple[Instances, list[tuple[int, int]]]:
    """Return each predicted token of sequences as an instance of its own, in their order.

    Args:
        instances: with targets ``[n, T]``, -100 where nothing is predicted.

    Returns:
        the instances, with a single target each, and the row and the position of each: input t is followed by
        target t.
    """
    rows, positions = (instances.targets != IGNORED).nonzero(as_tuple=True)
    found = instances[rows]
    at = torch.zeros_like(found.targets, dtype=torch.bool)
    at[torch.arange(len(rows)), positions] = True
    single = torch.where(at, found.targets, IGNORED)
    return Instances(found.inputs, single), list(zip(rows.tolist(), positions.tolist(), strict=True))
