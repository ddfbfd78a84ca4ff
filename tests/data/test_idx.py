"""Images in idx files: first ones for training, last ones for testing, refused where they are none."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fimo.data.idx import IdxData
from fimo.errors import InputError

FIMO_DATA = os.environ.get("FIMO_DATA")


def write(folder: Path, prefix: str, count: int, compressed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Write so many images of 3 by 2 pixels with their labels, byte by byte as the format says."""
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, 3, 2), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 4
    for name, values in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        header = bytes([0, 0, 8, values.ndim]) + b"".join(struct.pack(">I", n) for n in values.shape)
        content = header + values.tobytes()
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content) if compressed else content)
    return images, labels


def loaded(folder: Path, **settings: int | None) -> IdxData:
    data = IdxData(str(folder), **settings)
    data.setup()
    return data


@pytest.mark.parametrize("compressed", [False, True])
def test_one_file_gives_its_first_images_for_training_and_its_last_for_testing(
    tmp_path: Path, compressed: bool
) -> None:
    images, labels = write(tmp_path, "t10k", 20, compressed)
    data = loaded(tmp_path, train_size=12, test_size=5)
    assert data.origin("train").row.tolist() == list(range(12))
    assert data.origin("test").row.tolist() == list(range(15, 20))
    assert data.train.targets.tolist() == labels[:12].tolist()
    assert (data.outputs, data.inputs) == (4, 6)
    expected = torch.from_numpy(images[15:].astype(np.float32)) / 255
    mean, deviation = images[:12].astype(np.float64).mean() / 255, images[:12].std(ddof=1) / 255
    assert torch.allclose(data.test.inputs[:, 0], (expected - mean) / deviation, atol=1e-5)


def test_two_files_are_the_two_parts(tmp_path: Path) -> None:
    write(tmp_path, "train", 9)
    _, labels = write(tmp_path, "t10k", 6)
    data = loaded(tmp_path)
    assert (len(data.train), len(data.test)) == (9, 6)
    assert data.test.targets.tolist() == labels.tolist()
    assert len(loaded(tmp_path, train_size=4).train) == 4


def test_an_image_is_shown_with_its_class(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write(tmp_path, "train", 9)
    shown = loaded(tmp_path, train_size=5, test_size=4).named("test", 1)
    assert (shown.target, shown.data_row) == ("2", 6)
    assert str(shown.image).startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "dataset.train_size: must be given: .* has one file"),
        ({"train_size": 12}, "dataset.test_size: must be given"),
        ({"train_size": 12, "test_size": 9}, "dataset.train_size: expected at most 11 but got 12"),
        ({"train_size": 0}, "dataset.train_size: expected a positive number or null but got 0"),
    ],
)
def test_parts_that_can_not_be_are_refused(tmp_path: Path, settings: dict[str, int], said: str) -> None:
    write(tmp_path, "t10k", 20)
    with pytest.raises(InputError, match=said):
        loaded(tmp_path, **settings)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset\.path: must be given"):
        IdxData()
    with pytest.raises(InputError, match="holds no train-images-idx3-ubyte"):
        loaded(tmp_path)
    write(tmp_path, "train", 9)
    images = tmp_path / "train-images-idx3-ubyte"
    content = images.read_bytes()
    for damaged, said in (
        (content[:-1], "ends early: 53 of 54 bytes"),
        (b"no idx file", "no idx file of unsigned bytes with 3 axes"),
    ):
        images.write_bytes(damaged)
        with pytest.raises(InputError, match=said):
            loaded(tmp_path, train_size=3, test_size=3)
    images.write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="holds no train-labels-idx1-ubyte"):
        loaded(tmp_path, train_size=3, test_size=3)


@pytest.mark.skipif(FIMO_DATA is None, reason="FIMO_DATA is not set")
def test_mnists_test_digits() -> None:
    data = loaded(Path(str(FIMO_DATA)) / "mnist", train_size=5000, test_size=500)
    assert data.train.inputs.shape == (5000, 1, 28, 28)
    assert data.train.targets[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
