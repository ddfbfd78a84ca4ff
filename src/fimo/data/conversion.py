"""Whatever a user holds training or test instances in, as instances in memory."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from fimo.data.instances import Inputs, Instances
from fimo.data.mapped import array
from fimo.errors import InputError, shortened

if TYPE_CHECKING:
    import pandas as pd

Columns = str | Sequence[str] | None

BLOCK = 4096
"""Rows that are read together from data sets that may be larger than the memory."""

REAL = "expected real numbers, as of .real, .imag or .abs()"
"""Instead of complex ones."""

TARGETS = ("label", "labels", "target")
"""Columns that are taken for the target where none is named."""


def to_instances(
    source: Any,
    inputs: Columns = None,
    target: str | None = None,
    key: str = "dataset",
    text: Columns = None,
) -> Instances:
    """Return what holds instances as instances in memory, in the same order.

    Args:
        source: one of

            - :class:`~fimo.data.instances.Instances`, taken as they are;
            - ``(X, y)``: inputs and targets with one leading axis, each a tensor, an array, or (of numbers) a
              pandas DataFrame or Series; X may be a mapping of them, passed to the network by name;
            - a pandas DataFrame with a column ``target``: one vector of the other columns for each row;
            - a ``torch.utils.data.DataLoader`` that does not shuffle;
            - anything with a length whose elements are ``(inputs, target)`` or mappings from column names: a
              ``torch.utils.data.Dataset``, a ``datasets.Dataset``, a list.
        inputs: of mappings and DataFrames: the column that is the network's one argument, or a list of
            columns: of mappings passed by name, of a DataFrame one vector ``[D]`` in this order; None takes
            every column but ``target``.
        target: their target's column; ``label``, ``labels`` or ``target`` when None.
        key: for errors.
        text: a column, or columns, that are no input.

    Returns:
        Floating-point arrays and Python floats in torch's default dtype, tensors in their own, whole numbers
        and truth values as int64 (a DataFrame's inputs in the default dtype).

    Raises:
        InputError: with ``key``: no instances, elements of another form, inputs that differ in shape, NaN,
            complex numbers, a sparse tensor, a loader that shuffles or drops instances.
    """
    if isinstance(source, Instances):
        return source.detached()
    if isinstance(source, DataLoader):
        instances = _of_loader(source, inputs, target, key, text)
    elif _is_frame(source):
        instances = _of_frame(source, inputs, target, key, text)
    elif _is_pair(source, key):
        instances = _of_pair(source, key)
    elif _is_table(source):
        instances = _of_table(source, inputs, target, key, text)
    else:
        instances = _of_elements(source, inputs, target, key, text)
    for name, tensor in instances.tensors().items():
        for k, part in enumerate(tensor.split(BLOCK)):
            if part.is_floating_point() and not torch.isfinite(part).all():
                row = k * BLOCK + int((~torch.isfinite(part)).nonzero()[0, 0])
                raise InputError(key, f"element {row} has NaN or infinite {name}")
    return instances.detached()


def train_and_test(
    train: Any,
    test: Any,
    inputs: Columns = None,
    target: str | None = None,
    keys: tuple[str, str] = ("dataset.train", "dataset.test"),
    text: Columns = None,
) -> tuple[Instances, Instances]:
    """Return training and test instances, a test set's columns in the order of the training set's.

    Args:
        train, test, inputs, target, text: see :func:`to_instances`; DataFrames, also as X of ``(X, y)``, are
            matched by the names of their columns.
        keys: of the two, for errors.

    Raises:
        InputError: as :func:`to_instances`; or a column of the training set is missing from the test set.
    """
    first = to_instances(train, inputs, target, keys[0], text)
    if test is train:
        return first, first
    if _is_frame(train) and _is_frame(test) and not isinstance(inputs, str):
        inputs, target = _columns(list(train.columns), inputs, target, keys[0], text)
    elif _is_pair(train, keys[0]) and _is_pair(test, keys[1]) and _is_frame(train[0]) and _is_frame(test[0]):
        there = list(test[0].columns)
        if lacking := [c for c in train[0].columns if c not in there]:
            raise InputError(keys[1], f"has no column {lacking[0]!r}; there are {shortened(there)}")
        test = (test[0][list(train[0].columns)], test[1])
    return first, to_instances(test, inputs, target, keys[1], text)


def is_array(value: Any) -> bool:
    """Return whether a value is a tensor, an array, or a pandas Series or DataFrame."""
    return isinstance(value, Tensor | np.ndarray) or _is_frame(value) or _is_series(value)


def _of_elements(
    source: Any,
    inputs: Columns,
    target: str | None,
    key: str,
    text: Columns,
) -> Instances:
    def block(start: int, stop: int) -> Instances:
        try:
            elements = [source[i] for i in range(start, stop)]
        except (TypeError, KeyError, IndexError) as error:
            raise _no_set(source, key, error) from error
        return _of_block(elements, inputs, target, key, text)

    try:
        n = len(source)
    except TypeError as error:
        raise _no_set(source, key, error) from error
    if not n:
        raise InputError(key, "the data set is empty")
    return _filled(n, block, key, inputs)


def _no_set(source: Any, key: str, error: Exception) -> InputError:
    return InputError(
        key,
        "expected Instances, arrays (X, y), a DataFrame, a DataLoader, or a data set with a length and "
        f"elements but got {type(source).__name__} ({error!r})",
    )


def _filled(n: int, block: Callable[[int, int], Instances], key: str, inputs: Columns) -> Instances:
    """Return n instances that are read a block at a time, in temporary files where they are large.

    Args:
        block: of a start and a stop, the instances between.
        inputs: a column's name, for errors.
    """
    first = block(0, min(n, BLOCK))
    if len(first) == n:
        return first
    found = {name: array(n, *part.shape[1:], dtype=part.dtype) for name, part in first.tensors().items()}
    for start in range(0, n, BLOCK):
        some = first if start == 0 else block(start, min(n, start + BLOCK))
        for name, part in some.tensors().items():
            into = found[name]
            shown = inputs if name == "inputs" and isinstance(inputs, str) else name
            _same_shapes([tuple(into.shape[1:]), tuple(part.shape[1:])], key, shown)
            if part.dtype != into.dtype:  # whole numbers before the first fraction
                found[name] = into = into.to(torch.promote_types(part.dtype, into.dtype))
            into[start : start + len(part)] = part
    targets = found.pop("targets")
    return Instances(found if isinstance(first.inputs, dict) else found["inputs"], targets)


def _of_table(
    table: Any,
    inputs: Columns,
    target: str | None,
    key: str,
    text: Columns,
) -> Instances:
    """Return a ``datasets.Dataset``'s rows, whose columns are read in blocks."""
    if not len(table):
        raise InputError(key, "the data set is empty")
    wanted, target = _columns(table.column_names, inputs, target, key, text)
    plain = table.with_format("numpy") if table.format["type"] is None else table

    def part(rows: Mapping[str, Any], column: str, start: int, stop: int) -> Tensor:
        value = rows[column]
        if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":  # unlike shapes, or text
            value = table[start:stop][column]
        return _array(value, key, column) if is_array(value) else _stack(list(value), key, column)

    def block(start: int, stop: int) -> Instances:
        rows = plain[start:stop]
        found = {str(c): part(rows, c, start, stop) for c in wanted}
        single = isinstance(inputs, str)
        return Instances(next(iter(found.values())) if single else found, part(rows, target, start, stop))

    return _filled(len(table), block, key, inputs)


def _of_block(
    elements: list[Any],
    inputs: Columns,
    target: str | None,
    key: str,
    text: Columns,
) -> Instances:
    if isinstance(elements[0], Mapping):
        there = list(elements[0])
        wanted, target = _columns(there, inputs, target, key, text)
        stacked = {str(c): _stack([e[c] for e in elements], key, str(c)) for c in wanted}
        found: Inputs = next(iter(stacked.values())) if isinstance(inputs, str) else stacked
        return Instances(found, _stack([e[target] for e in elements], key, target))
    if not isinstance(elements[0], Sequence | tuple) or len(elements[0]) != 2:
        raise InputError(
            key, f"expected elements (inputs, target) or mappings but got {type(elements[0]).__name__}"
        )
    if any(len(element) != 2 for element in elements):
        raise InputError(key, "expected elements (inputs, target), of two parts each")
    values = [x for x, _ in elements]
    if isinstance(values[0], Mapping):
        found = {str(c): _stack([x[c] for x in values], key, str(c)) for c in values[0]}
    else:
        found = _stack(values, key, "inputs")
    return Instances(found, _stack([y for _, y in elements], key, "target"))


def _of_loader(
    loader: DataLoader[Any],
    inputs: Columns,
    target: str | None,
    key: str,
    text: Columns,
) -> Instances:
    if not isinstance(loader.sampler, SequentialSampler):
        raise InputError(
            key,
            f"a DataLoader with a {type(loader.sampler).__name__} does not say which instance is which; pass "
            "its data set, or shuffle=False",
        )
    if loader.drop_last and loader.batch_size and len(loader.dataset) % loader.batch_size:  # type: ignore[arg-type]
        raise InputError(
            key, "the DataLoader drops its last instances; pass its data set, or drop_last=False"
        )
    batches = list(loader)
    if not batches:
        raise InputError(key, "the data set is empty")
    first = batches[0]
    if isinstance(first, Mapping):
        wanted, target = _columns(list(first), inputs, target, key, text)
        joined = {str(c): _joined([b[c] for b in batches], key, str(c)) for c in wanted}
        found: Inputs = next(iter(joined.values())) if isinstance(inputs, str) else joined
        return Instances(found, _joined([b[target] for b in batches], key, target))
    if not isinstance(first, Sequence) or len(first) != 2:
        raise InputError(
            key, f"expected batches (inputs, targets) or mappings but got {type(first).__name__}"
        )
    if isinstance(first[0], Mapping):
        found = {str(c): _joined([x[c] for x, _ in batches], key, str(c)) for c in first[0]}
    else:
        found = _joined([x for x, _ in batches], key, "inputs")
    return Instances(found, _joined([y for _, y in batches], key, "targets"))


def _of_frame(
    frame: pd.DataFrame,
    inputs: Columns,
    target: str | None,
    key: str,
    text: Columns,
) -> Instances:
    if not len(frame):
        raise InputError(key, "the data set is empty")
    wanted, target = _columns(list(frame.columns), inputs, target, key, text)
    found = _array(frame[inputs] if isinstance(inputs, str) else frame[wanted], key, "inputs")
    return Instances(found, _array(frame[target], key, target))


def _of_pair(source: tuple[Any, Any], key: str) -> Instances:
    x, y = source
    found: Inputs
    if isinstance(x, Mapping):
        found = {str(name): _array(part, key, str(name)) for name, part in x.items()}
    else:
        found = _array(x, key, "inputs")
    targets = _array(y, key, "targets")
    parts = found if isinstance(found, dict) else {"inputs": found}
    for name, part in {**parts, "targets": targets}.items():
        if part.ndim == 0 or len(part) != len(targets):
            raise InputError(
                key, f"{name} of shape {tuple(part.shape)} for {len(targets)} targets; expected one each"
            )
    for part in x.values() if isinstance(x, Mapping) else [x]:
        _check_order(part, y, key)
    return Instances(found, targets)


def _check_order(inputs: Any, targets: Any, key: str) -> None:
    """Refuse tables with the same labels of rows in another order, of which positions or labels may count."""
    tables = [_is_frame(part) or _is_series(part) for part in (inputs, targets)]
    if not all(tables) or not (inputs.index.is_unique and targets.index.is_unique):
        return
    if not inputs.index.equals(targets.index) and inputs.index.isin(targets.index).all():
        raise InputError(
            key,
            "inputs and targets have the same index in another order; pass y.loc[X.index], or arrays "
            "(X.to_numpy(), y.to_numpy()) if they go together by position",
        )


def _is_pair(source: Any, key: str) -> bool:
    if not isinstance(source, tuple | list) or len(source) != 2:
        return False
    x, y = source
    if _holds_arrays(x) and not isinstance(y, Mapping) and not (isinstance(source, tuple) and is_array(y)):
        # no two elements of a data set, whose first would be a tuple, or a mapping as the second is
        found = f"a {type(source).__name__} of {type(x).__name__} and {type(y).__name__}"
        raise InputError(
            key, f"expected (X, y), a tuple whose targets y are an array or a tensor, but got {found}"
        )
    if isinstance(source, list):
        return False
    if is_array(y) and isinstance(x, tuple | list) and x and all(map(is_array, x)):
        raise InputError(
            key,
            f"expected (X, y) but X is a {type(x).__name__} of {len(x)} arrays: torch.stack those of single "
            "instances; several inputs of the network take a mapping by their names, {'ids': …, 'mask': …}",
        )
    return is_array(y) and _holds_arrays(x)


def _holds_arrays(x: Any) -> bool:
    """Return whether something is an array, or a mapping of arrays."""
    return is_array(x) or (isinstance(x, Mapping) and all(map(is_array, x.values())))


def _is_table(value: Any) -> bool:
    datasets = sys.modules.get("datasets")  # whoever holds one has imported it
    return datasets is not None and isinstance(value, datasets.Dataset)


def _is_frame(value: Any) -> bool:
    pandas = sys.modules.get("pandas")  # whoever holds one has imported it
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _is_series(value: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.Series)


def _columns(
    there: list[Any],
    inputs: Columns,
    target: str | None,
    key: str,
    text: Columns,
) -> tuple[list[Any], str]:
    """Return the columns of inputs, and the target's.

    Raises:
        InputError: with ``key``: there is no such column, or none is named and none has a usual name.
    """
    if target is None:
        usual = [name for name in TARGETS if name in there]
        if not usual:
            raise InputError(
                key, f"say which column is the target (target=...); there are {shortened(there)}"
            )
        target = usual[0]
    wanted = [inputs] if isinstance(inputs, str) else list(inputs or [])
    aside = [text] if isinstance(text, str) else list(text or [])
    wanted = wanted or [c for c in there if c not in (target, *aside)]
    for column in (*wanted, target):
        if column not in there:
            raise InputError(key, f"elements have no column {column!r}; there are {shortened(there)}")
    return wanted, target


def _array(value: Any, key: str, name: str) -> Tensor:
    """Return an array, Series or DataFrame as a tensor."""
    if isinstance(value, Tensor):
        return _typed(value, key, name, from_tensor=True)
    if _is_frame(value) or _is_series(value):
        frame = value.to_frame() if _is_series(value) else value
        if not frame.columns.is_unique:
            twice = frame.columns[frame.columns.duplicated()][0]
            raise InputError(key, f"has several columns named {twice!r}; rename or drop all but one")
        for column in frame.columns:
            if not (_numeric(frame[column])):
                raise InputError(
                    key, f"column {column!r} is of {frame[column].dtype}, not numbers; encode it first"
                )
            if frame[column].dtype.kind == "c":
                raise InputError(key, f"column {column!r} is of {frame[column].dtype}; {REAL}")
            if missing := frame[column].isna().to_numpy().nonzero()[0].tolist():
                raise InputError(key, f"column {column!r} has no value in row {missing[0]}")
        if _is_frame(value) and name == "inputs":
            return torch.tensor(np.ascontiguousarray(value, np.float64)).to(torch.get_default_dtype())
    if isinstance(value, np.memmap) and len(value) > BLOCK:
        starts = range(0, len(value), BLOCK)
        blocks = (_array(np.asarray(value[s : s + BLOCK]), key, name) for s in starts)
        first = next(blocks)
        found = array(len(value), *first.shape[1:], dtype=first.dtype)
        for start, block in zip(starts, itertools.chain([first], blocks), strict=True):
            found[start : start + BLOCK] = block
        return found
    try:
        tensor = torch.tensor(np.ascontiguousarray(value))
    except TypeError:
        hint = "; class names become numbers in the order of the network's outputs" * (name == "targets")
        raise InputError(key, f"{name} are an array of {value.dtype}, not numbers{hint}") from None
    return _typed(tensor, key, name)


def _numeric(column: Any) -> bool:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return bool(is_numeric_dtype(column) or is_bool_dtype(column))


def _typed(tensor: Tensor, key: str, name: str, from_tensor: bool = False) -> Tensor:
    if tensor.layout != torch.strided:
        raise InputError(key, f"{name} is sparse; pass .to_dense()")
    if tensor.is_complex():
        raise InputError(key, f"{name} is of {str(tensor.dtype).removeprefix('torch.')}; {REAL}")
    if tensor.is_floating_point():
        return tensor if from_tensor else tensor.to(torch.get_default_dtype())
    return tensor.to(torch.int64)


def _stack(items: list[Any], key: str, name: str) -> Tensor:
    """Return elements' parts as one tensor ``[n, ...]``."""
    try:
        tensors = [x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x)) for x in items]
    except TypeError:
        raise InputError(key, f"{name} of an element is {type(items[0]).__name__}, not numbers") from None
    _same_shapes([tuple(t.shape) for t in tensors], key, name)
    if any(sparse := [t.layout != torch.strided for t in tensors]):
        _typed(tensors[sparse.index(True)], key, name)  # refuses; some layouts can't be stacked
    return _typed(torch.stack(tensors), key, name, isinstance(items[0], Tensor))


def _joined(items: list[Any], key: str, name: str) -> Tensor:
    """Return batches' parts as one tensor ``[n, ...]``."""
    tensors = [_array(x, key, name) if is_array(x) else _stack(list(x), key, name) for x in items]
    _same_shapes([tuple(t.shape[1:]) for t in tensors], key, name)
    return torch.cat(tensors)


def _same_shapes(shapes: Sequence[tuple[int, ...]], key: str, name: str) -> None:
    if len(different := sorted(set(shapes))) > 1:
        first, second = different[:2]
        raise InputError(
            key, f"{name} differ in shape between elements ({first} and {second}); pad or resize them"
        )
