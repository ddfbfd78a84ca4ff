"""Images: decoded, normalised by the training part, shown as data addresses; clear answers to bad files."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fimo.data.image import ImageData, decode
from fimo.errors import InputError

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
FIMO_DATA = os.environ.get("FIMO_DATA")


def pixels(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)


def png(seed: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, side)).save(buffer, format="PNG")
    return buffer.getvalue()


def folder(path: Path, per_class: int = 3) -> Path:
    for s, split in enumerate(("train", "test")):
        for c, name in enumerate(("cat", "dog")):
            (path / split / name).mkdir(parents=True)
            for k in range(per_class):
                (path / split / name / f"{k}.png").write_bytes(png(100 * s + 10 * c + k))
    return path


def image_data(path: Path, **arguments: object) -> ImageData:
    data = ImageData(str(path), **arguments)  # type: ignore[arg-type]
    data.setup()
    return data


def test_channels_are_normalised_by_the_training_images(tmp_path: Path) -> None:
    data = image_data(folder(tmp_path))
    raw = np.stack([pixels(10 * c + k) for c in range(2) for k in range(3)]).astype(np.float64) / 255
    mean, deviation = raw.mean((0, 1, 2)), raw.std((0, 1, 2), ddof=1)
    test = np.stack([pixels(100 + 10 * c + k) for c in range(2) for k in range(3)]) / 255
    expected = torch.tensor((test - mean) / deviation).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(data.test.inputs, expected, rtol=1e-5, atol=1e-5)
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.class_names, data.outputs, data.inputs) == (("cat", "dog"), 2, 192)


def test_a_display_is_the_image_itself_enlarged(tmp_path: Path) -> None:
    shown = image_data(folder(tmp_path)).display("train", 4)
    assert shown.target == "dog"
    assert shown.image is not None
    content = base64.b64decode(shown.image.removeprefix("data:image/png;base64,"))
    array = np.asarray(Image.open(io.BytesIO(content)))
    assert array.shape == (64, 64, 3)
    np.testing.assert_array_equal(array[::8, ::8], pixels(11))


def test_parquet_files_hold_the_same_images(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow, which reads parquet, is not installed")
    import pandas as pd

    (tmp_path / "files").mkdir()
    (tmp_path / "tables").mkdir()
    for s, split in enumerate(("train", "test")):
        rows = [
            {"img": {"bytes": png(100 * s + 10 * c + k), "path": None}, "label": c}
            for c in range(2)
            for k in range(3)
        ]
        pd.DataFrame(rows).to_parquet(tmp_path / "tables" / f"{split}-0.parquet")
    ours = image_data(tmp_path / "tables", image="img", class_names=["cat", "dog"])
    theirs = image_data(folder(tmp_path / "files"))
    assert isinstance(ours.train.inputs, torch.Tensor)
    assert isinstance(theirs.train.inputs, torch.Tensor)
    assert torch.equal(ours.train.inputs, theirs.train.inputs)
    assert torch.equal(ours.test.targets, theirs.test.targets)
    with pytest.raises(
        InputError, match=r"dataset.target: label '1' in training image row 3 is not among the classes cat"
    ):
        image_data(tmp_path / "tables", image="img", class_names=["cat"])


def test_greys_sizes_and_draws(tmp_path: Path) -> None:
    data = image_data(folder(tmp_path), channels=1, size=4, train_size=4, test_size=2)
    assert isinstance(data.train.inputs, torch.Tensor)
    assert isinstance(data.test.inputs, torch.Tensor)
    assert data.train.inputs.shape == (4, 1, 4, 4)
    assert data.test.inputs.shape == (2, 1, 4, 4)
    assert str(data.display("test", 0).image).startswith("data:image/png;base64,")


def test_bad_images_are_answered_by_file_and_key(tmp_path: Path) -> None:
    path = folder(tmp_path)
    broken = path / "test" / "dog" / "1.png"
    whole = broken.read_bytes()
    for content in (whole[: len(whole) // 2], b"no image"):
        broken.write_bytes(content)
        with pytest.raises(InputError, match=r"dataset.path: .*test/dog/1.png is not an image") as caught:
            image_data(path)
        assert "\n" not in str(caught.value)
    broken.write_bytes(png(1, side=5))
    with pytest.raises(InputError, match=r"dataset.size: images differ in size"):
        image_data(path)
    assert len(image_data(path, size=8).test) == 6
    broken.write_bytes(whole)
    (path / "test" / "dog").rename(path / "test" / "wolf")
    with pytest.raises(
        InputError, match=r"label 'wolf' in test image wolf/0.png is not among the classes cat, dog"
    ):
        image_data(path)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        image_data(tmp_path / "none")
    with pytest.raises(InputError, match=r"holds neither train/CLASS and test/CLASS nor"):
        image_data(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match=r"no image in .*train/CLASS/"):
        image_data(tmp_path)
    with pytest.raises(InputError, match="must be given"):
        ImageData().setup()


@pytest.mark.skipif(FIMO_DATA is None, reason="FIMO_DATA is not set")
def test_cifar10_is_read_from_its_folder() -> None:
    data = image_data(Path(str(FIMO_DATA)) / "cifar10", train_size=200, test_size=50)
    assert data.outputs == 10
    assert isinstance(data.train.inputs, torch.Tensor)
    assert data.train.inputs.shape == (200, 3, 32, 32)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_the_upper_bits_of_images_of_16_bits_are_taken(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256], [4660, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    for channels in (1, 3):
        assert decode(path, channels, None)[..., 0].tolist() == [[0, 0, 1], [18, 128, 255]]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_images_of_32_bits_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.ones((2, 2), dtype=kind)).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"dataset\.path: .*deep\.tif has pixels of 32 bits"):
        decode(tmp_path / "deep.tif", 1, None)


def test_images_are_turned_as_their_camera_was(tmp_path: Path) -> None:
    lying = np.zeros((2, 3), dtype=np.uint8)
    lying[0] = (50, 100, 200)
    picture = Image.fromarray(lying)
    exif = picture.getexif()
    exif[0x0112] = 6  # the first row is the right column
    picture.save(tmp_path / "lying.png", exif=exif)
    assert decode(tmp_path / "lying.png", 1, None)[..., 0].tolist() == [[0, 50], [0, 100], [0, 200]]


def test_hidden_folders_and_files_are_no_images(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "train" / ".ipynb_checkpoints").mkdir()
    (path / "train" / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(png(1))
    (path / "train" / "cat" / "._0.png").write_bytes(b"of macOS")
    data = image_data(path)
    assert (data.class_names, len(data.train)) == (("cat", "dog"), 6)


def tables(path: Path, labels: list, cells: list | None = None) -> Path:
    import pandas as pd

    cells = cells or [{"bytes": png(k), "path": None} for k in range(len(labels))]
    for split in ("train", "test"):
        pd.DataFrame({"image": cells, "label": labels}).to_parquet(path / f"{split}.parquet")
    return path


@pytest.mark.parametrize(
    ("labels", "names", "classes", "targets"),
    [
        ([11, 2, 0, 10, 1], None, ("0", "1", "2", "10", "11"), [4, 2, 0, 3, 1]),
        (["b ", "a", "b"], None, ("a", "b"), [1, 0, 1]),
        (["08", "007", "08"], ["007", "08"], ("007", "08"), [1, 0, 1]),
        (np.array([0.5, 0.25], np.float32), None, ("0.25", "0.5"), [1, 0]),
        ([0, 1, 0], [1, 0], ("1", "0"), [1, 0, 1]),
        ([0, 1, 0], ["cat", "dog"], ("cat", "dog"), [0, 1, 0]),
        ([1, 2, 1], [1, 2], ("1", "2"), [0, 1, 0]),
    ],
)
def test_labels_of_tables_are_ordered_as_numbers_or_given(
    tmp_path: Path, labels: list, names: list | None, classes: tuple, targets: list
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow, which reads parquet, is not installed")
    data = image_data(tables(tmp_path, labels), class_names=names)
    assert data.class_names == classes
    assert data.train.targets.tolist() == data.test.targets.tolist() == targets


def test_cells_of_paths_are_read_and_those_of_nothing_are_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow, which reads parquet, is not installed")
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(png(k))
    cells = [{"bytes": None, "path": str(tmp_path / f"{k}.png")} for k in range(2)]
    data = image_data(tables(tmp_path, [0, 1], cells), class_names=["a", "b"])
    np.testing.assert_array_equal(data._pixels["train"][1].permute(1, 2, 0), pixels(1))
    with pytest.raises(
        InputError, match=r"dataset\.target: the label in data row 1 of the training table of"
    ):
        image_data(tables(tmp_path, ["a", None], cells))
    with pytest.raises(InputError, match=r"dataset\.image: no column 'img' in the training table of"):
        image_data(tmp_path, image="img")
    for cell, said in (
        ({"bytes": None, "path": "gone.png"}, "data row 1 holds a path, .* there is no gone.png"),
        ({"bytes": None, "path": None}, "data row 1 holds neither an image's bytes nor its path"),
    ):
        with pytest.raises(InputError, match=rf"dataset\.image: {said}"):
            image_data(tables(tmp_path, [0, 1], [cells[0], cell]))
