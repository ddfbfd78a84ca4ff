"""Rows in files: the same bytes however they are made: at once, in parts, after a kill, side by side."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from fimo.errors import InputError
from fimo.store.row_files import EACH, RowFiles

N, WIDTH = 5 * EACH + 7, 12


def rows_of(start: int, stop: int) -> Tensor:
    index = torch.arange(start, stop, dtype=torch.float64)[:, None]
    return torch.sin(index * torch.arange(1, WIDTH + 1))


def files(folder: Path, dtype: torch.dtype = torch.float32) -> RowFiles:
    return RowFiles(folder, N, WIDTH, dtype)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_read_as_they_were_made(tmp_path: Path, dtype: torch.dtype) -> None:
    made = files(tmp_path, dtype)
    assert made.make(rows_of) == N
    expected = rows_of(0, N).to(dtype)
    assert torch.equal(torch.cat([rows for rows, _ in made.blocks()]), expected)
    lengths = torch.cat([lengths for _, lengths in made.blocks()])
    torch.testing.assert_close(lengths, expected.float().norm(dim=1))
    index = torch.tensor([N - 1, 3, EACH, EACH - 1, 3])
    assert torch.equal(made.some(index), expected[index])
    assert made.make(rows_of) == 0  # nothing is made twice


def test_parts_made_elsewhere_are_together_the_bytes_of_one_go(tmp_path: Path) -> None:
    files(tmp_path / "whole").make(rows_of)
    for k in range(3):
        files(tmp_path / str(k)).make(rows_of, (k, 3))
        for path in (tmp_path / str(k)).iterdir():
            (tmp_path / "joined").mkdir(exist_ok=True)
            path.rename(tmp_path / "joined" / path.name)
    assert files(tmp_path / "joined").missing() == []
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")


def _killed(folder: Path) -> None:
    def dying(start: int, stop: int) -> Tensor:
        if start == 2 * EACH:
            os._exit(9)
        return rows_of(start, stop)

    files(folder).make(dying)


def test_a_killed_process_leaves_whole_files_and_the_next_goes_on(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path / "a",))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert len(files(tmp_path / "a").missing()) == 4
    asked: list[int] = []

    def noted(start: int, stop: int) -> Tensor:
        asked.append(start)
        return rows_of(start, stop)

    assert files(tmp_path / "a").make(noted) == N - 2 * EACH
    assert asked == [EACH * k for k in range(2, 6)]
    files(tmp_path / "b").make(rows_of)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_two_that_make_the_same_rows_share_the_work_and_wait_for_each_other(tmp_path: Path) -> None:
    made: list[int] = []

    def slow(start: int, stop: int) -> Tensor:
        made.append(start)
        time.sleep(0.05)
        return rows_of(start, stop)

    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(files(tmp_path).make(slow))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [EACH * k for k in range(6)]
    assert sum(counts) == N
    assert min(counts) > 0
    assert files(tmp_path).missing() == []


def test_rows_that_another_process_is_making_are_waited_for(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    held = FileLock(tmp_path / f"{EACH:012d}.lock")
    held.acquire()
    worker = threading.Thread(target=lambda: files(tmp_path).make(rows_of))
    worker.start()
    time.sleep(0.3)
    assert files(tmp_path).missing() == [EACH]
    assert worker.is_alive()
    held.release()  # as when its process was killed
    worker.join()
    assert files(tmp_path).missing() == []


def test_numbers_that_the_kept_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    tiny = RowFiles(tmp_path / "tiny", 3, 4, torch.float16)
    with pytest.raises(InputError, match=r"storage: row 0 has the length 2e-09, and 0 in .*choose bfloat16"):
        tiny.make(lambda start, stop: torch.full((3, 4), 1e-9))
    with pytest.raises(InputError, match="gradients: row 1 has the length nan, which is not finite"):
        tiny.make(lambda start, stop: torch.tensor([[1.0] * 4, [float("nan")] * 4, [1.0] * 4]))
    assert RowFiles(tmp_path / "tiny", 3, 4, torch.bfloat16).make(lambda a, b: torch.full((3, 4), 1e-9)) == 3


def test_a_missing_file_is_named_and_others_are_not_taken_for_it(tmp_path: Path) -> None:
    files(tmp_path).make(rows_of)
    with pytest.raises(InputError, match=r"holds \[1024, 12\] torch.float32; delete its folder"):
        list(files(tmp_path, torch.bfloat16).blocks())
    (tmp_path / f"{EACH:012d}.safetensors").unlink()
    with pytest.raises(InputError, match=r"000000001024.safetensors is missing"):
        list(files(tmp_path).blocks())
