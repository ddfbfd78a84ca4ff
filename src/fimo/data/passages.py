"""Passages, and prompts with completions, as they are written: text files and tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from fimo.data.cells import is_nested
from fimo.data.origin import Origin, first_line
from fimo.data.text import LINES, SUFFIXES, read_table
from fimo.data.tokens import Tokens
from fimo.errors import InputError, shortened


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.

    Args:
        text: of passages, where there are no prompts.
        prompt, completion: of prompts; both or none are there.
        id: of identifiers.
        fact: of what a passage states, or a prompt asks for.
    """

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    id: str | None = None
    fact: str | None = None


@dataclass(frozen=True)
class Passages:
    """n passages as they are written.

    Args:
        frame: ``[n]`` rows of the source, in its order.
        origin: of the rows.
        prompts: ``[n]``, empty where everything is predicted.
        texts: ``[n]``, what is predicted.
        sources: ``[n]``, names of files.
        facts: ``[n]``, what each states or asks for, empty for nothing; None where nothing is said.
        column: of the frame that holds the texts.
    """

    frame: pd.DataFrame
    origin: Origin
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    sources: tuple[str, ...]
    facts: tuple[str, ...] | None
    column: str

    def __len__(self) -> int:
        return len(self.texts)

    def source(self, row: int) -> str:
        """Return the file that a passage is of; empty where all are of one."""
        return self.sources[row] if len(set(self.sources)) > 1 else ""

    def __getitem__(self, rows: np.ndarray) -> Passages:
        """Return some of the passages, under their rows of the whole frame."""

        def of(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[k] for k in rows)

        return replace(
            self,
            origin=self.origin[rows],
            prompts=of(self.prompts),
            texts=of(self.texts),
            sources=of(self.sources),
            facts=None if self.facts is None else of(self.facts),
        )

    def cut(self, tokens: Tokens, length: int) -> Tokenised:
        """Turn passages into tokens; those of more than ``length`` become several, of about equal size.

        Pieces have a table of their own, with a row for each, and passages of a single token, which has
        nothing to be predicted from, are left out of it.

        Raises:
            InputError: a prompt with its completion is too long.
        """
        found, starts, rows = [], [], []
        prompts = tokens.encode(self.prompts, special=False)
        whole, closed = (tokens.encode(self.texts, special=special) for special in (True, False))
        for row, prompt in enumerate(prompts):
            if not prompt:
                parts = pieces(whole[row], length)
            elif len(prompt) + len(closed[row]) <= length:
                parts = [[*prompt, *closed[row]]]
            else:
                raise InputError(
                    "dataset.length",
                    f"{self.origin.where(row)} of {self.sources[row]} has {len(prompt) + len(closed[row])} "
                    f"tokens, and prompts with completions are not cut; set it to at least "
                    f"{len(prompt) + len(closed[row]) - 1}",
                )
            found += parts
            starts += [len(prompt)] * len(parts)
            rows += [row] * len(parts)
        passages = self
        if rows != list(range(len(self))):
            passages = self._in_pieces(np.asarray(rows, dtype=np.int64), [tokens.decode(i) for i in found])
        return Tokenised(passages, tuple(found), tuple(starts), np.asarray(rows, dtype=np.int64))

    def _in_pieces(self, rows: np.ndarray, texts: Sequence[str]) -> Passages:
        names = self.origin.id
        found = replace(self, origin=replace(self.origin, id=None))[rows]
        several = pd.Series(rows).duplicated(keep=False).tolist()
        part = (pd.Series(rows).groupby(rows).cumcount() + 1).tolist()
        texts = [text if cut else whole for text, cut, whole in zip(texts, several, found.texts, strict=True)]
        ids = names and tuple(
            f"{names[row]}/{k}" if cut else names[row]
            for row, k, cut in zip(rows, part, several, strict=True)
        )
        frame = self.frame.iloc[rows].reset_index(drop=True).assign(**{self.column: texts})
        origin = replace(found.origin, row=np.arange(len(rows), dtype=np.int64), id=ids, first_line=None)
        return replace(found, frame=frame, origin=origin, texts=tuple(texts))


@dataclass(frozen=True)
class Tokenised:
    """n passages, or pieces of them, as tokens.

    Args:
        passages: as written.
        ids: ``[n]``, their tokens.
        starts: ``[n]``, how many of these are the prompt's.
        whole: ``[n]``, which passage each is a piece of.
    """

    passages: Passages
    ids: tuple[list[int], ...]
    starts: tuple[int, ...]
    whole: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, wholes: np.ndarray) -> Tokenised:
        """Return the pieces of some passages, in their order."""
        rows = np.flatnonzero(np.isin(self.whole, wholes))
        order = {int(w): k for k, w in enumerate(wholes)}
        rows = rows[np.argsort([order[int(self.whole[r])] for r in rows], kind="stable")]
        ids, starts = tuple(self.ids[r] for r in rows), tuple(self.starts[r] for r in rows)
        return Tokenised(self.passages[rows], ids, starts, self.whole[rows])


def pieces(ids: Sequence[int], length: int) -> list[list[int]]:
    """Cut token indices into pieces of at most ``length``, of about equal size; none of a single token."""
    count = max(1, -(-len(ids) // length))
    found = [list(part) for part in np.array_split(np.asarray(ids), count)]
    return [[int(i) for i in part] for part in found if len(part) > 1]


def read_passages(given: str | None, key: str, columns: Columns, prompts: bool = False) -> Passages:
    """Read a folder of ``.txt`` files (searched through), one text file, or a table.

    Args:
        given: tables are tsv, csv, parquet, jsonl or json; all else is text, where blank lines end a passage.
        key: that errors name.
        prompts: the file must be a table of prompts.

    Raises:
        InputError: nothing to read, no such column, or an empty cell.
    """
    if given is None:
        raise InputError(key, "must be given: a folder of .txt files, a text file, or a table")
    path = Path(given)
    if path.is_file() and (prompts or path.suffix.lower() in SUFFIXES):
        return from_table(read_table(path, key), path, key, columns, prompts)
    files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
    if not files:
        raise InputError(key, f"no .txt file in {path}" if path.is_dir() else f"no such file: {path}")
    if columns.id is not None:
        raise InputError("dataset.id", f"text files have no columns, and {path} is no table")
    rows = [(file.name, text) for file in files for text in paragraphs(file, key)]
    frame = pd.DataFrame(rows, columns=["file", "text"])
    sources, texts = (tuple(frame[name].tolist()) for name in ("file", "text"))
    return Passages(frame, Origin.counted(len(frame)), ("",) * len(frame), texts, sources, None, "text")


def from_table(
    frame: pd.DataFrame, path: Path, key: str, columns: Columns, prompts: bool = False
) -> Passages:
    """Return the passages, or prompts and completions, of a table; see :func:`read_passages`."""
    if frame.empty:
        raise InputError(key, f"{path} has no rows")
    asked = [name for name in (columns.prompt, columns.completion) if name in frame]
    read = [columns.prompt, columns.completion] if prompts or asked else [columns.text]
    for name in read:
        if name not in frame:
            instead = "" if prompts or asked else f", nor {columns.prompt!r} and {columns.completion!r}"
            there = shortened(list(map(str, frame)))
            raise InputError(key, f"{path} has no column {name!r}{instead}; it has {there}")
        if is_nested(frame[name]):
            raise InputError(key, f"column {name!r} of {path} holds lists or records, not texts")
    facts = _facts(frame, path, columns)
    lines = LINES.get(path.suffix.lower())
    first = None if lines is None else first_line(path.read_text("utf-8-sig"), len(frame), lines)
    inside = [name for name in (*read, columns.fact) if name is not None]
    origin = Origin.of_frame(frame, columns.id, inside, path.name, first)
    cells = [tuple(_filled(frame, name, path, key, origin.where)) for name in read]
    before, texts = cells if len(cells) == 2 else (("",) * len(frame), cells[0])
    return Passages(frame, origin, before, texts, (path.name,) * len(frame), facts, read[-1])


def _filled(
    frame: pd.DataFrame, name: str, path: Path, key: str, where: Callable[[int], str]
) -> Iterator[str]:
    missing = frame[name].isna()
    for row, (value, absent) in enumerate(zip(frame[name].astype(str), missing, strict=True)):
        if absent or not value.strip():
            raise InputError(key, f"the {name} in {where(row)} of {path} is empty")
        yield value


def _facts(frame: pd.DataFrame, path: Path, columns: Columns) -> tuple[str, ...] | None:
    if columns.fact is None or columns.fact not in frame:
        return None
    return tuple("" if pd.isna(value) else str(value).strip() for value in frame[columns.fact])


def paragraphs(file: Path, key: str = "dataset.path") -> list[str]:
    """Return a file's passages, between blank lines.

    Raises:
        InputError: the file is not UTF-8 text.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(key, f"{file} is not a UTF-8 text file") from None
    return [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
