"""Reads what W&B wrote offline: ``wandb.proto`` records in the framing of LevelDB's logs.

A file is 7 bytes (``:W&B``, a magic number, a version), then blocks of 32 KiB that hold chunks of
4 bytes checksum, 2 bytes length, 1 byte type (1 whole, 2 first, 3 middle, 4 last) and data; a record is a
whole chunk, or a first, any middle and a last one. Fewer than 7 bytes left in a block are padding.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
HEADER = 7


@dataclass
class OfflineRun:
    """What a run's file says."""

    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    sweep: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    """Step metric by metric or pattern."""
    exit_code: int | None = None
    hidden: set[str] = field(default_factory=set)
    artifacts: list[Any] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    console: str = ""
    system: int = 0
    """How many records of the system's metrics."""


def read_offline_run(run_dir: Path, which: int | None = None) -> OfflineRun:
    """Read the one offline run under a run's folder, or one of several.

    W&B's own process may write for a moment after ``finish`` returned, so the exit record is waited for.
    """
    paths = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert which is not None or len(paths) == 1, paths
    path = paths[which or 0]
    for _ in range(200):
        found = parsed(path.read_bytes())
        if found.exit_code is not None:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no exit record")


def parsed(content: bytes) -> OfflineRun:
    found = OfflineRun()
    for data in records(content):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.id, found.sweep = record.run.run_id, record.run.sweep_id
            found.name, found.project = record.run.display_name, record.run.project
            found.group, found.tags = record.run.run_group, list(record.run.tags)
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found.history.append(_nested(record.history.item))
        elif kind == "summary":
            found.summary |= _nested(record.summary.update)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            if record.metric.options.hidden:
                found.hidden.add(record.metric.name)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "alert":
            found.alerts.append(f"{record.alert.title}: {record.alert.text}")
        elif kind in ("output", "output_raw", "output_logger"):
            found.console += getattr(record, kind).line
        elif kind == "stats":
            found.system += 1
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _nested(items: Any) -> dict[str, Any]:
    """Return values by key; a medium's fields (type, path, …) as the dict that they were."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inside = found
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return found


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file."""
    assert data[:4] == b":W&B"
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if kind == 0:
            return
        parts.append(data[position + HEADER : position + HEADER + length])
        if position + HEADER + length > len(data):
            return  # still being written
        position += HEADER + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
