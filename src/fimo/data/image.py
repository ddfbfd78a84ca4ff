"""Images with one class each: CIFAR-10 and any other, from a folder, parquet files or a hub."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
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
from fimo.data.labels import class_indices, read_labels
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
        labels: names of folders, or a table's labels as they are written.
        classes: what they are called as classes, whose order is that of the classes.
        origin: rows of the table, or positions among the folder's files in the order of their names, whose
            identifiers are their paths.
    """

    contents: list[Path | bytes]
    labels: list[str]
    classes: list[Any]
    origin: Origin

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Sequence[int]) -> Pictures:
        return Pictures(
            [self.contents[i] for i in rows],
            [self.labels[i] for i in rows],
            [self.classes[i] for i in rows],
            self.origin[rows],
        )


class ImageData(InstancesModule):
    """Images ``[n, c, h, w]`` in float32, each channel normalised by the training images' mean and deviation.

    No augmentation: further training sees the images as they are, turned as their EXIF orientation says. Of
    16 bits a channel the upper 8 are taken; images of 32 bits are refused.

    Args:
        path: a folder ``train/CLASS/*`` and ``test/CLASS/*`` (or ``validation``), or one with
            ``train*.parquet`` and ``test*.parquet``; or a folder ``CLASS/*`` beside ``test_path``.
        test_path: a folder ``CLASS/*`` of test images.
        hub: name of a data set on the hub, read where ``path`` is None.
        size: height and width that images are resized to; None keeps them, which must then be alike.
        channels: 3 (colours) or 1 (greys).
        image, target: columns of parquet files and hub data sets; ``label`` is an earlier name of ``target``.
        id: their column of identifiers; files in folders are called by their path.
        class_names: the labels, or what labels 0, 1, ... are called; None takes the labels found in the
            training set: folders in the order of their names, numbers in a table in theirs.
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
        class_names: Sequence[str | int] | None = None,
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
        self._given_names = tuple(map(str, class_names)) if class_names is not None else None

    def load(self) -> None:
        require("dataset", IMAGES)
        train, test = self._read()
        found = sorted(set(train.classes))
        self.class_names = self._given_names or tuple(map(str, found))
        if len(found) < 2:
            raise InputError("dataset.path", f"the training images have one class only ({shortened(found)})")
        generator = np.random.default_rng(self.split_seed)
        train = drawn(train, self.train_size, generator)
        test = drawn(test, self.test_size, generator)
        self.origins = {"train": train.origin, "test": test.origin}
        targets = self._targets(train, test)
        self._pixels = {"train": self._decode(train), "test": self._decode(test)}
        if self._pixels["train"].shape[1:] != self._pixels["test"].shape[1:]:
            shapes = [tuple(self._pixels[s].shape[2:]) for s in ("train", "test")]
            raise InputError(
                "dataset.size", f"training and test images differ in size ({shapes}); set dataset.size"
            )
        values = {split: pixels.float() / 255 for split, pixels in self._pixels.items()}
        mean = values["train"].mean((0, 2, 3), keepdim=True)
        deviation = values["train"].std((0, 2, 3), keepdim=True).clamp(min=1e-6)
        self.train = Instances((values["train"] - mean) / deviation, targets[: len(train)])
        self.test = Instances((values["test"] - mean) / deviation, targets[len(train) :])
        self.outputs = len(self.class_names)

    def display(self, split: Split, index: int) -> Display:
        target = self.class_names[int(self._instance(split, index).targets)]
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
            return self._of_tables([self._from_parquet(path, name) for name in ("train", test)], path.name)
        test = next((n for n in TEST_NAMES if (path / n).is_dir()), None)
        if test is None or not (path / "train").is_dir():
            raise InputError(
                "dataset.path",
                f"{path} holds neither train/CLASS and test/CLASS nor train*.parquet and test*.parquet; "
                "test images in another folder are dataset.test_path",
            )
        return folder(path / "train"), folder(path / test)

    def _from_parquet(self, path: Path, split: str) -> pd.DataFrame:
        try:
            files = sorted(path.glob(f"{split}*.parquet"))
            return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
        except Exception as error:  # pyarrow has its own errors
            raise InputError("dataset.path", f"{path}/{split}*.parquet can't be read ({error})") from None

    def _from_hub(self) -> tuple[Pictures, Pictures]:
        if self.hub is None:
            raise InputError("dataset.path", "must be given: a folder with train/CLASS/* and test/CLASS/*")
        require_hub(f"the data set {self.hub!r}", "dataset.path", "set dataset.path to a local copy")
        from datasets import Image, load_dataset

        try:
            found = load_dataset(self.hub)
            test = next(n for n in TEST_NAMES if n in found)
            frames = [
                found[n].cast_column(self.image, Image(decode=False)).to_pandas() for n in ("train", test)
            ]
        except Exception as error:
            raise InputError("dataset.hub", f"{self.hub!r} can't be read ({error})".splitlines()[0]) from None
        return self._of_tables(frames, self.hub)

    def _of_tables(self, frames: Sequence[pd.DataFrame], source: str) -> tuple[Pictures, Pictures]:
        """Return the images of a training and a test table of one source."""
        for split, frame in zip(("training", "test"), frames, strict=True):
            for key, column in (("image", self.image), ("target", self.target)):
                if column not in frame:
                    problem = f"no column {column!r} in the {split} table of {source}"
                    raise InputError(f"dataset.{key}", f"{problem}; there are {shortened(list(frame))}")
            if (empty := frame[self.target].isna()).any():
                row = int(empty.to_numpy().argmax())
                problem = f"the {self.target} in data row {row} of the {split} table of {source} is empty"
                raise InputError("dataset.target", problem)
        classes = read_labels(pd.concat([frame[self.target] for frame in frames], ignore_index=True)).tolist()
        found = []
        for frame in frames:
            origin = Origin.of_frame(frame, self.id, (self.image, self.target), source)
            contents = [encoded(cell, origin.where(row)) for row, cell in enumerate(frame[self.image])]
            labels = frame[self.target].astype(str).tolist()
            called, classes = classes[: len(frame)], classes[len(frame) :]
            found.append(Pictures(contents, labels, called, origin))
        return found[0], found[1]

    def _targets(self, train: Pictures, test: Pictures) -> Tensor:
        """Return the classes of the training images and then of the test images ``[n]``."""
        parts = ((train, "training"), (test, "test"))
        names = [f"{split} image {part.origin.name(k)}" for part, split in parts for k in range(len(part))]
        labels = pd.Series([*train.labels, *test.labels], dtype=object)
        given = self._given_names is not None
        return torch.tensor(class_indices(labels, self.class_names, names.__getitem__, numbered=given))

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
    """Return the images of ``path/CLASS/*`` in the order of their names, without hidden files and folders."""
    folders = [c for c in sorted(path.iterdir()) if c.is_dir() and not c.name.startswith(".")]
    files = [f for c in folders for f in sorted(c.iterdir()) if not f.name.startswith(".")]
    files = [f for f in files if f.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(key, f"no image in {path}/CLASS/")
    origin = Origin(np.arange(len(files)), tuple(f.relative_to(path).as_posix() for f in files), path.name)
    names = [f.parent.name for f in files]
    return Pictures(list(files), names, names, origin)


def drawn(pictures: Pictures, size: int | None, generator: np.random.Generator) -> Pictures:
    """Return ``size`` pictures, drawn without replacement and kept in their order; all when None."""
    if size is None or size >= len(pictures):
        return pictures
    return pictures[np.sort(generator.choice(len(pictures), size, replace=False)).tolist()]


def encoded(cell: Any, where: str) -> Path | bytes:
    """Return what a table's cell says of an image: a file's bytes, or else its path.

    Args:
        cell: either of them, or a mapping of both, as the datasets library has it.
        where: names the cell, for errors.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise InputError("dataset.image", f"{where} holds neither an image's bytes nor its path")
    if not Path(cell).is_file():
        raise InputError(
            "dataset.image", f"{where} holds a path, not an image's bytes, and there is no {cell}"
        )
    return Path(cell)


def decode(content: Path | bytes, channels: int, size: int | None) -> np.ndarray:
    """Return an image's pixels ``[h, w, c]`` uint8, turned as its EXIF orientation says.

    Raises:
        InputError: naming the file that is no image, or whose pixels are numbers of 32 bits.
    """
    from PIL import Image, ImageOps

    source: Any = io.BytesIO(content) if isinstance(content, bytes) else content
    where = content if isinstance(content, Path) else "an embedded image"
    try:
        with Image.open(source) as opened:
            picture = ImageOps.exif_transpose(opened)
            # older versions of pillow read greys of 16 bits in PNG as I
            if picture.mode.startswith("I;16") or (picture.mode == "I" and opened.format == "PNG"):
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            mode = picture.mode
            picture = picture.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # a damaged image fails in many ways
        raise InputError("dataset.path", f"{where} is not an image ({type(error).__name__})") from None
    if mode in ("I", "F"):
        problem = f"{where} has pixels of 32 bits, whose range is not known; save it with 8 or 16 bits"
        raise InputError("dataset.path", problem)
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
