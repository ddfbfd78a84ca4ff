"""Images with one class each: CIFAR-10 and any other, from a folder, parquet files or a hub."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fimo.data.datamodule import InstancesModule, Split
from fimo.data.display import Display
from fimo.data.hub import require_hub
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.errors import InputError, shortened
from fimo.extras import IMAGES, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TEST_NAMES = ("test", "validation", "valid", "val")
THUMBNAIL = 64
"""Smaller images are enlarged by whole factors to at least this many pixels a side, for display."""


@dataclass(frozen=True)
class Pictures:
    """Encoded images of a split with their labels.

    Args:
        contents: a file's path, or its bytes.
        labels: class names.
        origin: rows of the table, or positions among the folder's files in the order of their names, whose
            identifiers are their paths.
    """

    contents: list[Path | bytes]
    labels: list[str]
    origin: Origin

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Sequence[int]) -> Pictures:
        contents, labels = [self.contents[i] for i in rows], [self.labels[i] for i in rows]
        return Pictures(contents, labels, self.origin[rows])


class ImageData(InstancesModule):
    """Images ``[n, c, h, w]`` in float32, each channel normalised by the training images' mean and deviation.

    No augmentation: further training sees the images as they are.

    Args:
        path: a folder ``train/CLASS/*`` and ``test/CLASS/*`` (or ``validation``), or one with
            ``train*.parquet`` and ``test*.parquet``; or a folder ``CLASS/*`` beside ``test_path``.
        test_path: a folder ``CLASS/*`` of test images.
        hub: name of a data set on the hub, read where ``path`` is None.
        size: height and width that images are resized to; None keeps them, which must then be alike.
        channels: 3 (colours) or 1 (greys).
        image, target: columns of parquet files and hub data sets; ``label`` is an earlier name of ``target``.
        id: their column of identifiers; files in folders are called by their path.
        class_names: of integer labels 0, 1, ...; None takes the labels found in the training set.
        train_size, test_size: how many instances, drawn at random; None for all.
        split_seed: of the draws.
    """

    def __init__(
        self,
        path: str | None = None,
        hub: str | None = None,
        size: int | None = None,
        channels: int = 3,
        image: str = "image",
        target: str = "label",
        class_names: Sequence[str] | None = None,
        train_size: int | None = None,
        test_size: int | None = None,
        name: str = "images",
        batch_size: int = 128,
        split_seed: int = 0,
        id: str | None = None,
        label: str | None = None,
        test_path: str | None = None,
    ) -> None:
        super().__init__(name, batch_size)
        for key, value in (("size", size), ("train_size", train_size), ("test_size", test_size)):
            if value is not None and value < 1:
                raise InputError(f"dataset.{key}", f"expected a positive number or null but got {value}")
        if channels not in (1, 3):
            raise InputError("dataset.channels", f"expected 1 or 3 but got {channels}")
        self.task = "classification"
        self.path, self.hub, self.size, self.channels = path, hub, size, channels
        self.test_path = test_path
        self.image, self.target, self.id = image, target if label is None else label, id
        self.train_size, self.test_size, self.split_seed = train_size, test_size, split_seed
        self._given_names = tuple(class_names) if class_names is not None else None

    def load(self) -> None:
        require("dataset", IMAGES)
        train, test = self._read()
        found = sorted(set(train.labels))
        self.class_names = self._given_names or tuple(found)
        if len(found) < 2:
            raise InputError("dataset.path", f"the training images have one class only ({shortened(found)})")
        generator = np.random.default_rng(self.split_seed)
        train = drawn(train, self.train_size, generator)
        test = drawn(test, self.test_size, generator)
        self.origins = {"train": train.origin, "test": test.origin}
        targets = {"train": self._indices(train, "train"), "test": self._indices(test, "test")}
        self._pixels = {"train": self._decode(train), "test": self._decode(test)}
        if self._pixels["train"].shape[1:] != self._pixels["test"].shape[1:]:
            shapes = [tuple(self._pixels[s].shape[2:]) for s in ("train", "test")]
            raise InputError(
                "dataset.size", f"training and test images differ in size ({shapes}); set dataset.size"
            )
        values = {split: pixels.float() / 255 for split, pixels in self._pixels.items()}
        mean = values["train"].mean((0, 2, 3), keepdim=True)
        deviation = values["train"].std((0, 2, 3), keepdim=True).clamp(min=1e-6)
        self.train = Instances((values["train"] - mean) / deviation, targets["train"])
        self.test = Instances((values["test"] - mean) / deviation, targets["test"])
        self.outputs = len(self.class_names)

    def display(self, split: Split, index: int) -> Display:
        target = self.class_names[int(getattr(self, split).targets[index])]
        return Display(target, image=data_address(self._pixels[split][index]))

    def _read(self) -> tuple[Pictures, Pictures]:
        if self.path is None:
            return self._from_hub()
        path = Path(self.path)
        if not path.is_dir():
            raise InputError("dataset.path", f"no such folder: {path}")
        if self.test_path is not None:
            if not Path(self.test_path).is_dir():
                raise InputError("dataset.test_path", f"no such folder: {self.test_path}")
            return folder(path), folder(Path(self.test_path), "dataset.test_path")
        if sorted(path.glob("train*.parquet")):
            test = next((n for n in TEST_NAMES if sorted(path.glob(f"{n}*.parquet"))), None)
            if test is None:
                raise InputError("dataset.path", f"{path} holds no test*.parquet beside train*.parquet")
            return self._from_parquet(path, "train"), self._from_parquet(path, test)
        test = next((n for n in TEST_NAMES if (path / n).is_dir()), None)
        if test is None or not (path / "train").is_dir():
            raise InputError(
                "dataset.path",
                f"{path} holds neither train/CLASS and test/CLASS nor train*.parquet and test*.parquet; "
                "test images in another folder are dataset.test_path",
            )
        return folder(path / "train"), folder(path / test)

    def _from_parquet(self, path: Path, split: str) -> Pictures:
        try:
            files = sorted(path.glob(f"{split}*.parquet"))
            frame = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
        except Exception as error:  # pyarrow has its own errors
            raise InputError("dataset.path", f"{path}/{split}*.parquet can't be read ({error})") from None
        for key, column in (("image", self.image), ("target", self.target)):
            if column not in frame:
                raise InputError(
                    f"dataset.{key}",
                    f"no column {column!r} in {files[0]}; there are {shortened(list(frame.columns))}",
                )
        contents: list[Any] = [c.get("bytes") if isinstance(c, dict) else c for c in frame[self.image]]
        origin = Origin.of_frame(frame, self.id, (self.image, self.target), path.name)
        return Pictures(contents, [self._name(label) for label in frame[self.target]], origin)

    def _from_hub(self) -> tuple[Pictures, Pictures]:
        if self.hub is None:
            raise InputError("dataset.path", "must be given: a folder with train/CLASS/* and test/CLASS/*")
        require_hub(f"the data set {self.hub!r}", "dataset.path", "set dataset.path to a local copy")
        from datasets import Image, load_dataset

        try:
            found = load_dataset(self.hub)
            test = next(n for n in TEST_NAMES if n in found)
            splits = [found[n].cast_column(self.image, Image(decode=False)) for n in ("train", test)]
        except Exception as error:
            raise InputError("dataset.hub", f"{self.hub!r} can't be read ({error})".splitlines()[0]) from None
        return tuple(  # type: ignore[return-value]
            Pictures(
                [c["bytes"] for c in s[self.image]],
                [self._name(label) for label in s[self.target]],
                Origin.of_frame(s.remove_columns(self.image).to_pandas(), self.id, (self.target,), self.hub),
            )
            for s in splits
        )

    def _name(self, label: Any) -> str:
        """Return a label's class name; integers index the given names."""
        names = self._given_names
        if names is not None and not isinstance(label, str):
            if not 0 <= int(label) < len(names):
                raise InputError("dataset.target", f"label {label} is not among the {len(names)} classes")
            return names[int(label)]
        return str(label)

    def _indices(self, pictures: Pictures, split: str) -> Tensor:
        known = {name: k for k, name in enumerate(self.class_names)}
        for label in pictures.labels:
            if label not in known:
                raise InputError(
                    "dataset.target",
                    f"class {label!r} of a {split} image is not among {shortened(self.class_names)}",
                )
        return torch.tensor([known[label] for label in pictures.labels])

    def _decode(self, pictures: Pictures) -> Tensor:
        """Return pixels ``[n, c, h, w]`` uint8."""
        arrays: list[np.ndarray] = []
        for content in pictures.contents:
            array = decode(content, self.channels, self.size)
            if arrays and array.shape != arrays[0].shape:
                raise InputError(
                    "dataset.size",
                    f"images differ in size ({array.shape[:2]} and {arrays[0].shape[:2]}); set dataset.size",
                )
            arrays.append(array)
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def folder(path: Path, key: str = "dataset.path") -> Pictures:
    """Return the images of ``path/CLASS/*`` in the order of their names."""
    files = [f for c in sorted(path.iterdir()) if c.is_dir() for f in sorted(c.iterdir())]
    files = [f for f in files if f.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(key, f"no image in {path}/CLASS/")
    origin = Origin(np.arange(len(files)), tuple(f.relative_to(path).as_posix() for f in files), path.name)
    return Pictures(list(files), [f.parent.name for f in files], origin)


def drawn(pictures: Pictures, size: int | None, generator: np.random.Generator) -> Pictures:
    """Return ``size`` pictures, drawn without replacement and kept in their order; all when None."""
    if size is None or size >= len(pictures):
        return pictures
    return pictures[np.sort(generator.choice(len(pictures), size, replace=False)).tolist()]


def decode(content: Path | bytes, channels: int, size: int | None) -> np.ndarray:
    """Return an image's pixels ``[h, w, c]`` uint8.

    Raises:
        InputError: naming the file that is no image.
    """
    from PIL import Image

    source: Any = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with Image.open(source) as opened:
            picture = opened.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # a damaged image fails in many ways
        where = content if isinstance(content, Path) else "an embedded image"
        raise InputError("dataset.path", f"{where} is not an image ({type(error).__name__})") from None
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(picture, dtype=np.uint8)
    return array if array.ndim == 3 else array[:, :, None]


def data_address(pixels: Tensor) -> str:
    """Return an image ``[c, h, w]`` uint8 as a ``data:image/png;base64,...`` address."""
    from PIL import Image

    factor = -(-THUMBNAIL // max(pixels.shape[1:]))
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    if factor > 1:
        large = (picture.width * factor, picture.height * factor)
        picture = picture.resize(large, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
