"""Files of tables: text in any common form, compressed or not, Excel sheets, parquet, JSON."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from fimo.data.origin import first_line
from fimo.data.quoting import check_lines, is_number
from fimo.errors import InputError
from fimo.extras import XLS, XLSX, require

EXACT: dict[str, Any] = (
    {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}
)
"""For ``pandas.read_csv``: numbers become the nearest float, as they do by default from pandas 3.1 on."""

SEPARATORS = {"auto": None, "comma": ",", "semicolon": ";", "tab": "\t", "whitespace": r"\s+"}
KEY = "dataset.path"
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zip": lambda content: _only_member(content),
}
SHEETS, PARQUET, JSON = (".xlsx", ".xlsm", ".xls"), (".parquet", ".pq"), (".jsonl", ".json")
NAMELESS = "columns without names"
"""Key of ``DataFrame.attrs``: the file has no line of names, so that a copy of it has none either."""
GUESSED = "cp1252"
"""What a text that is not UTF-8 is read as where nothing is said: a superset of printable latin-1."""


@dataclass(frozen=True)
class Form:
    """How a file is to be read.

    Args:
        header, separator, encoding: of text; see :func:`read_frame`.
        sheet: of Excel: name or number from 0.
        decimal: the point of text's numbers; those in another form stay text.
        id: column of text or Excel whose cells stay as they are written, without spaces around them.
    """

    header: bool = True
    separator: str = "auto"
    encoding: str = "auto"
    sheet: str | int = 0
    decimal: str = "."
    id: str | None = None


def read_file(path: Path, form: Form, key: str = KEY) -> tuple[pd.DataFrame, int | None, str]:
    """Read a table by its file's suffix.

    Args:
        path: ``.xlsx``, ``.xls``, ``.parquet``, ``.jsonl``, ``.json``; all else is text, maybe compressed.
        key: that errors name.

    Returns:
        the table, the file's line of data row 0 (None where rows are no lines), and the encoding that was
        guessed (else empty).

    Raises:
        InputError: no such file, or not a table.
    """
    check_file(path, key)
    suffix = path.suffix.lower()
    if suffix in SHEETS:
        require(key, XLS if suffix == ".xls" else XLSX, "or give a text table")
        return _sheet(path, form, key), None, ""
    if suffix in PARQUET:
        return _named(_read(path, key, lambda: pd.read_parquet(path).reset_index(drop=True)), True), None, ""
    if suffix in JSON:
        frame, text = _json(path, form, key)
        return frame, first_line(text, len(frame), False) if text else None, ""
    text, guessed = decoded(path, form.encoding, key)
    frame = parse(path, text, form.header, form.separator, form.decimal, key, identifiers=form.id)
    return frame, first_line(text, len(frame), form.header), guessed


def as_written(path: Path, form: Form, key: str = KEY) -> pd.DataFrame:
    """Return a file's table with every cell of text, or value of JSON, as it is written."""
    suffix = path.suffix.lower()
    if suffix in JSON:
        frame, _ = _json(path, form, key, object)  # of numbers, 3 would be 3.0 beside 2.5
    elif suffix in (*SHEETS, *PARQUET):
        frame = read_file(path, replace(form, id=None), key)[0]
    else:
        text, _ = decoded(path, form.encoding, key)
        frame = parse(path, text, form.header, form.separator, form.decimal, key, as_text=True)
    if not form.header and suffix not in (*PARQUET, *JSON):
        frame.attrs[NAMELESS] = True
    return frame


def read_frame(path: Path, header: bool | None, separator: str, encoding: str = "utf-8") -> pd.DataFrame:
    """Read a text table.

    Args:
        header: whether the first line names the columns; None to see from whether it holds numbers only.
        separator: one of ``SEPARATORS``, or the character.
        encoding: ``auto`` for UTF-8, and else UTF-16 by its mark or the usual one of Windows.

    Raises:
        InputError: naming ``dataset.path``: no such file, or not a table.
    """
    check_file(path, KEY)
    return parse(path, decoded(path, encoding, KEY)[0], header, separator, ".", KEY)


def check_file(path: Path, key: str) -> None:
    """Refuse what is no file."""
    if not path.is_file():
        problem = f"expected a file but {path} is a folder" if path.is_dir() else f"no such file: {path}"
        raise InputError(key, problem)


def decoded(path: Path, encoding: str, key: str) -> tuple[str, str]:
    """Return a file's text, decompressed by its suffix, and its encoding where that was guessed (else "")."""
    content = path.read_bytes()
    if (unpack := COMPRESSIONS.get(path.suffix.lower())) is not None:
        try:
            content = unpack(content)
        except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile) as error:
            raise InputError(key, f"{path} can't be decompressed ({error})") from None
    asked = "utf-8-sig" if encoding.lower() in ("auto", "utf-8", "utf8") else encoding
    if encoding == "auto" and content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        asked = "utf-16"
    guessed = ""
    try:
        text = _text(content, asked)
    except LookupError:
        raise InputError("dataset.encoding", f"Python knows no encoding {encoding!r}") from None
    except UnicodeError:
        problem = f"{path} is not {asked.removesuffix('-sig')} text; set dataset.encoding, such as latin-1"
        if encoding != "auto" or b"\x00" in content:
            binary = "; or is it no text, as NumPy's files are none?" if b"\x00" in content else ""
            raise InputError(key, f"{problem} or utf-16{binary}") from None
        try:
            text, guessed = _text(content, GUESSED), GUESSED
        except UnicodeError:
            raise InputError(key, f"{problem} or utf-16") from None
    if not text.strip():
        raise InputError(key, f"{path} is empty")
    return text, guessed


def parse(
    path: Path,
    text: str,
    header: bool | None,
    separator: str,
    decimal: str,
    key: str,
    as_text: bool = False,
    identifiers: str | None = None,
) -> pd.DataFrame:
    """Return the table that a text is.

    Args:
        path: for errors.
        decimal: the point of numbers; cells in another form stay text.
        as_text: every cell as it is written, empty ones too.
        identifiers: a column whose cells stay as they are written.
    """
    if separator not in SEPARATORS and len(separator) != 1:
        allowed = ", ".join(SEPARATORS)
        raise InputError("dataset.separator", f"expected {allowed} or one character but got {separator!r}")
    found = SEPARATORS.get(separator, separator) or guess_separator(text)
    check_lines(path, text, found, key, skipinitialspace=True)
    first = next(line for line in text.splitlines() if line.strip())
    pattern = found if found == r"\s+" else re.escape(found)
    numbers_only = all(is_number(cell) for cell in re.split(pattern, first.strip()))
    if header and numbers_only:
        raise InputError(
            "dataset.header", f"the first line of {path} holds numbers only; set dataset.header=false"
        )
    header = not numbers_only if header is None else header
    if header and len(found) == 1:
        names = [name.strip() for name in next(csv.reader([first], delimiter=found))]
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise InputError(key, f"{path} has several columns named {twice[0]!r}; rename them")
    written = {"dtype": str, "keep_default_na": False}
    # of the faster engine, which knows these choices; in parts, a column could be read as numbers and as text
    exact = {**EXACT, "low_memory": False} if found.isascii() else {"engine": "python"}

    def read(**choices: Any) -> pd.DataFrame:
        frame: pd.DataFrame = pd.read_csv(
            io.StringIO(text),
            sep=found,
            header=0 if header else None,
            skipinitialspace=True,
            decimal=decimal,
            **exact,
            **choices,
        )
        return frame

    try:
        frame = read(**(written if as_text else {}))
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(key, f"{path} is not a table separated by {found!r} ({reason})") from None
    if frame.shape[1] < 2:
        raise InputError("dataset.separator", f"{path} has one column only when separated by {found!r}")
    frame = frame if header else frame.rename(columns=str)
    if identifiers is not None and identifiers in frame and not as_text:
        column = read(usecols=[list(frame).index(identifiers)], **written).iloc[:, 0]
        frame = frame.assign(**{identifiers: column.str.strip()})
    return frame


def guess_separator(text: str) -> str:
    """Return the separator that (nearly) all first lines agree on: semicolon, comma, tab, else whitespace.

    Semicolons come first, since lines with them may hold decimal commas.
    """
    lines = [line for line in text.splitlines()[:20] if line.strip()]
    rows = {candidate: list(csv.reader(lines, delimiter=candidate)) for candidate in (";", ",", "\t")}
    # where a quoted cell goes over lines, maybe since it is never closed, the lines as they are come last
    plain = {c: [line.split(c) for line in lines] for c, read in rows.items() if len(read) < len(lines)}
    for found in (rows, plain):
        for least in (1.0, 0.8):  # a line of another length is said to be wrong, not its separator
            for candidate, cells in found.items():
                width, count = Counter(map(len, cells)).most_common(1)[0]
                if width > 1 and count >= least * len(cells):
                    return candidate
    return r"\s+"


def _text(content: bytes, encoding: str) -> str:
    return io.TextIOWrapper(io.BytesIO(content), encoding).read()  # which refuses utf-16 without its mark


def _only_member(content: bytes) -> bytes:
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX")]
    if len(names) != 1:
        raise zipfile.BadZipFile(f"expected one file in it but there are {len(names)}")
    return archive.read(names[0])


def _sheet(path: Path, form: Form, key: str) -> pd.DataFrame:
    """Return an Excel sheet's table without its empty columns."""
    choices: dict[str, Any] = {"sheet_name": form.sheet, "header": 0 if form.header else None}
    frame = _read(path, key, lambda: pd.read_excel(path, **choices))
    names = [str(c).strip() for c in frame]
    found = _named(frame.dropna(how="all", axis=1), form.header)
    if form.id is None or form.id not in found:
        return found
    choices |= {"usecols": [names.index(form.id)], "dtype": object, "keep_default_na": False}
    column = _read(path, key, lambda: pd.read_excel(path, **choices)).iloc[:, 0]
    return found.assign(**{form.id: column.map(lambda v: v.strip() if isinstance(v, str) else v)})


def _read(path: Path, key: str, reader: Callable[[], Any]) -> pd.DataFrame:
    try:
        frame: pd.DataFrame = reader()
    except Exception as error:  # each reader has its own errors
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(key, f"{path} can't be read ({line})") from None
    return frame


def _json(path: Path, form: Form, key: str, dtype: type | None = None) -> tuple[pd.DataFrame, str]:
    """Return the table of a JSON file or of lines of JSON, and the text where its lines are the rows."""
    text, guessed = decoded(path, form.encoding, key)
    if guessed:
        problem = f"{path} is not UTF-8 text, as JSON is; write it in UTF-8"
        raise InputError(key, f"{problem}, or set dataset.encoding where that is a table's")
    by_line = path.suffix.lower() == ".jsonl"
    content: Any = None
    if not by_line:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            by_line = error.msg == "Extra data"  # as after the first of several lines
            if not by_line:
                raise InputError(key, f"{path} is no JSON: {error}; expected {TABLES}") from None
    if by_line:
        content = _records(path, text, key)
    no_table = InputError(key, f"{path} holds no table; expected {TABLES}")
    if not isinstance(content, list | dict):
        raise no_table
    try:
        frame = pd.DataFrame(content, dtype=dtype)
    except (ValueError, TypeError, AttributeError):
        raise no_table from None
    return _named(frame, True), text if by_line else ""


TABLES = "a list of rows, columns by name, or a row on each line"
"""That a JSON file may be."""


def _records(path: Path, text: str, key: str) -> list[Any]:
    """Return the JSON value of each line that is not blank."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                problem = f"line {number} of {path} is no JSON value by itself: {error.msg}"
                raise InputError(key, f"{problem}; expected {TABLES}") from None
    return records


def _named(frame: pd.DataFrame, header: bool) -> pd.DataFrame:
    if header and (twice := frame.columns[frame.columns.duplicated()].tolist()):
        raise InputError(KEY, f"has several columns named {twice[0]!r}; rename them")
    return frame.rename(columns=lambda c: str(c).strip())
