"""Images in idx files, as MNIST and the data sets in its form come."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch

from fimo.data.datamodule import InstancesModule, Split
from fimo.data.display import Display
from fimo.data.image import data_address
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.errors import InputError
from fimo.extras import IMAGES, require

UNSIGNED_BYTES = 0x08
"""Their code in an idx file's header."""


class IdxData(InstancesModule):
    """Grey images ``[n, 1, h, w]`` in float32, normalised by the training images' mean and deviation.

    Args:
        path: a folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, and the same of the test
            images, which begin with ``t10k``; compressed (``.gz``) or not. Where only one of the pairs is
            there, the first of its images are for training and the last ones for testing.
        train_size: training instances, the first ones; None for all.
        test_size: test instances, the last ones; None for all.

    Raises:
        InputError: naming ``dataset.path``, ``dataset.train_size`` or ``dataset.test_size``.
    """

    def __init__(
        self,
        path: str | None = None,
        train_size: int | None = None,
        test_size: int | None = None,
        name: str = "mnist",
        batch_size: int = 64,
    ) -> None:
        super().__init__(name, batch_size)
        for key, size in (("train_size", train_size), ("test_size", test_size)):
            if size is not None and size < 1:
                raise InputError(f"dataset.{key}", f"expected a positive number or null but got {size}")
        if path is None:
            raise InputError("dataset.path", "must be given: a folder with train-images-idx3-ubyte and so on")
        self.path, self.train_size, self.test_size = Path(path), train_size, test_size
        self.task = "classification"

    def load(self) -> None:
        prefixes = [name for name in ("train", "t10k") if _files(self.path, f"{name}-images-idx3-ubyte")]
        if not prefixes:
            raise InputError("dataset.path", f"{self.path} holds no train-images-idx3-ubyte or t10k-images-…")
        images, labels = zip(*(read_pair(self.path, prefix) for prefix in prefixes), strict=True)
        rows = self._rows([len(part) for part in images])
        parts: dict[Split, tuple[np.ndarray, np.ndarray]] = {
            "train": (images[0][rows["train"]], labels[0][rows["train"]]),
            "test": (images[-1][rows["test"]], labels[-1][rows["test"]]),
        }
        self._pixels = {split: torch.from_numpy(pixels)[:, None] for split, (pixels, _) in parts.items()}
        self.origins = {split: Origin(rows[split]) for split in parts}
        self.outputs = 1 + int(max(part.max() for part in labels))
        self.class_names = tuple(map(str, range(self.outputs)))
        values = {split: pixels.float() / 255 for split, pixels in self._pixels.items()}
        mean, deviation = values["train"].mean(), values["train"].std().clamp(min=1e-6)
        self.train, self.test = (
            Instances((values[split] - mean) / deviation, torch.from_numpy(classes.astype(np.int64)))
            for split, (_, classes) in parts.items()
        )

    def _rows(self, counts: list[int]) -> dict[Split, np.ndarray]:
        """Return the images of each part, by their position in its file.

        Args:
            counts: of images, in one file for both parts, or in one for each.
        """
        most: dict[Split, int] = {"train": counts[0], "test": counts[-1]}
        if len(counts) == 1:
            if self.train_size is None or self.test_size is None:
                problem = f"must be given: {self.path} has one file for training and test images"
                raise InputError(f"dataset.{'train' if self.train_size is None else 'test'}_size", problem)
            most["train"] -= self.test_size
        sizes: dict[Split, int] = {
            "train": self.train_size or most["train"],
            "test": self.test_size or most["test"],
        }
        for split, size in sizes.items():
            if size > most[split]:
                raise InputError(f"dataset.{split}_size", f"expected at most {most[split]} but got {size}")
        return {
            "train": np.arange(sizes["train"], dtype=np.int64),
            "test": np.arange(counts[-1] - sizes["test"], counts[-1], dtype=np.int64),
        }

    def display(self, split: Split, index: int) -> Display:
        require("dataset", IMAGES)
        target = self.class_names[int(self._instance(split, index).targets)]
        return Display(target, image=data_address(self._pixels[split][index]))


def read_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[n, h, w]`` and labels ``[n]`` uint8 of files whose names begin with ``prefix``.

    Raises:
        InputError: a file is missing or of another form, or they differ in number.
    """
    found = []
    for name, axes in ((f"{prefix}-images-idx3-ubyte", 3), (f"{prefix}-labels-idx1-ubyte", 1)):
        files = _files(folder, name)
        if not files:
            raise InputError("dataset.path", f"{folder} holds no {name} (or {name}.gz)")
        found.append(read_idx(files[0], axes))
    images, labels = found
    if len(images) != len(labels):
        raise InputError("dataset.path", f"{folder} has {len(images)} images and {len(labels)} labels")
    return images, labels


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Return the unsigned bytes of an idx file, compressed or not, with so many axes.

    The header is two zero bytes, the type's code, the number of axes, and each axis's length as four bytes,
    the most significant first (LeCun, Cortes and Burges, 1998).

    Raises:
        InputError: not such a file.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise InputError("dataset.path", f"{path} can't be read ({error})") from None
    if content[:4] != bytes([0, 0, UNSIGNED_BYTES, axes]):
        raise InputError("dataset.path", f"{path} is no idx file of unsigned bytes with {axes} axes")
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(int)
    values = np.frombuffer(content[start:], dtype=np.uint8)
    if len(values) != shape.prod():
        raise InputError("dataset.path", f"{path} ends early: {len(values)} of {shape.prod()} bytes")
    return values.reshape(shape).copy()


def _files(folder: Path, name: str) -> list[Path]:
    return [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
