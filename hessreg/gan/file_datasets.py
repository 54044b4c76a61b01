"""Data sets from the user's files: IDX (MNIST and its kin), folders of images, NumPy arrays."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from hessreg.gan.data import Dataset, ScaledSamples, split_at_random
from hessreg.gan.sample_files import (
    SampleFileError,
    check_finite,
    image_files,
    open_image,
    read_array,
)

__all__ = ["load_arrays", "load_images", "load_mnist"]

_LEAST = 60  # samples: a sixth of them is for tests, which compare neighbours
_LEAST_TEST = 10
_CHUNK = 8192
_KINDS = {"images": 3, "labels": 1}  # and their dimensions
_DAMAGE = (OSError, EOFError, zlib.error)


def load_mnist(data: str) -> Dataset:
    """Return MNIST, Fashion-MNIST or anything else that is stored as they are.

    Args:
        data: Folder with ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, and for a
            test set the same with ``t10k`` in place of ``train``; each plain or with ``.gz``.
            Without a test set, a sixth is put aside (`split_at_random`).

    Returns:
        Images ``[n, 1, h, w]``, kept with 8 bits.

    Raises:
        SampleFileError: If a file is missing or damaged.
    """
    folder = _folder(data, "the folder of train-images-idx3-ubyte and train-labels-idx1-ubyte")
    train, labels = _read_split(folder, "train")
    samples = _from_bytes(train)
    _check_count(folder, len(train), _LEAST)
    if not any(file.name.startswith("t10k-") for file in folder.iterdir()):
        return split_at_random("mnist", samples, labels)
    test, test_labels = _read_split(folder, "t10k")
    _check_count(folder, len(test), _LEAST_TEST, "test samples")
    if test.shape[1:] != train.shape[1:]:
        wanted, got = _by(train.shape[2:]), _by(test.shape[2:])
        raise SampleFileError(f"{folder}: test images must have {wanted} pixels, got {got}")
    return Dataset("mnist", samples, labels, _from_bytes(test), test_labels)


def _folder(data: str, wanted: str) -> Path:
    """Return the folder that the option ``data`` names."""
    path = Path(data)
    if not data or not path.is_dir():
        missing = "nothing" if not data else f"{path}, which is no folder"
        raise SampleFileError(f"data must be {wanted}, got {missing}")
    return path


def _check_count(path: Path, count: int, least: int, what: str = "samples") -> None:
    if count < least:
        raise SampleFileError(f"{path} must hold at least {least} {what}, got {count}")


def _from_bytes(pixels: Tensor) -> ScaledSamples:
    return ScaledSamples(pixels, 1 / 127.5, -1.0)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images ``uint8[n, 1, h, w]`` and labels ``[n]``."""
    images, labels = (_read_idx(_idx_file(folder, split, kind), _KINDS[kind]) for kind in _KINDS)
    if len(images) != len(labels):
        raise SampleFileError(
            f"{folder}: {split} has {len(images)} images and {len(labels)} labels"
        )
    return images.unsqueeze(1), labels.to(torch.int64)


def _idx_file(folder: Path, split: str, kind: str) -> Path:
    name = f"{split}-{kind}-idx{_KINDS[kind]}-ubyte"
    for each in (name, f"{name}.gz", name.replace("-idx", ".idx")):
        if (folder / each).is_file():
            return folder / each
    raise SampleFileError(f"there is no {name} or {name}.gz in {folder}")


def _read_idx(file: Path, dimensions: int) -> Tensor:
    """Bytes in the format of Y. LeCun: 0, 0, 8, dimensions, big-endian sizes, values."""
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) < 4 + 4 * dimensions:
                wanted = f"{8:#06x}{dimensions:02x}"
                raise SampleFileError(
                    f"{file} must begin with {wanted}, bytes in {dimensions} dimensions, got"
                    f" 0x{header[:4].hex()}"
                )
            sizes = [int(size) for size in np.frombuffer(header, ">u4", offset=4)]
            wanted_bytes = math.prod(sizes)
            values = _read_at_most(cast(IO[bytes], stream), wanted_bytes + 1)
    except _DAMAGE as error:
        raise SampleFileError(f"{file} is not a readable file ({error})") from None
    if len(values) != wanted_bytes or not wanted_bytes:
        got = "more" if len(values) > wanted_bytes else f"{len(values)}"
        raise SampleFileError(
            f"{file} must hold {_by(sizes)} = {wanted_bytes} bytes after its header, got {got}"
        )
    return torch.frombuffer(values, dtype=torch.uint8).view(sizes)


def _read_at_most(stream: IO[bytes], count: int) -> bytearray:
    """What is there, in pieces: a damaged header may ask for any amount."""
    values = bytearray()
    while len(values) < count:
        piece = stream.read(min(count - len(values), 2**24))
        if not piece:
            break
        values += piece
    return values


def load_images(data: str, size: int = 32, channels: int = 3) -> Dataset:
    """Return a folder of PNG or JPEG images, cropped to the square in the middle and scaled.

    Args:
        data: The folder, or one whose subfolders are the classes (in the order of their names,
            with the images at any depth below).
        size: Pixels in each direction.
        channels: 3 for colours, 1 for grey.

    Returns:
        Images ``[n, channels, size, size]``, kept with 8 bits; a sixth of them is the test set
        (`split_at_random`).

    Raises:
        SampleFileError: If there are too few, or one cannot be read.
    """
    folder = _folder(data, "a folder of PNG or JPEG images, or of such folders")
    files, labels = _find_images(folder)
    _check_count(folder, len(files), _LEAST, "images (.png, .jpg, .jpeg)")
    pixels = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    for index, file in enumerate(files):
        pixels[index] = _read_square(file, size, channels)
    return split_at_random("images", _from_bytes(pixels), torch.tensor(labels))


def _find_images(folder: Path) -> tuple[list[Path], list[int]]:
    """The images and their classes."""
    files = image_files(folder)
    below = {child.name: _images_below(child) for child in _subfolders(folder)}
    classes = {name: found for name, found in below.items() if found}
    if files and classes:
        raise SampleFileError(
            f"{folder} must hold either images or folders of images (classes), got both:"
            f" {files[0].name} and {next(iter(classes))}"
        )
    labels = [label for label, found in enumerate(classes.values()) for _ in found]
    found_below = [file for found in classes.values() for file in found]
    return files or found_below, labels or [0] * len(files)


def _images_below(folder: Path) -> list[Path]:
    below = [file for child in _subfolders(folder) for file in _images_below(child)]
    return image_files(folder) + below


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir())


def _read_square(file: Path, size: int, channels: int) -> Tensor:
    """The middle of an image, ``uint8[channels, size, size]``."""
    from PIL import ImageOps

    with open_image(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
        side = min(upright.size)
        left, top = ((length - side) // 2 for length in upright.size)
        middle = upright.crop((left, top, left + side, top + side))
        square = np.array(middle.resize((size, size)))
    return torch.from_numpy(square).view(size, size, channels).permute(2, 0, 1)


def load_arrays(data: str, key: str = "", labels_key: str = "") -> Dataset:
    """Return points or images from a NumPy file.

    Args:
        data: ``.npy`` or ``.npz`` with points ``[n, d]``, each component of which is scaled to
            mean 0 and standard deviation 1, or images ``[n, h, w]`` or ``[n, c, h, w]`` with 1 or
            3 channels: 8-bit, or in floating point between 0 and 1 or between -1 and 1. A large
            ``.npy`` stays on the disk.
        key: Name of the array in an ``.npz``; not needed if it holds no other but the labels.
        labels_key: Name of the labels, integers ``[n]``, in an ``.npz``.

    Returns:
        Points or images; a sixth of them is the test set (`split_at_random`).

    Raises:
        SampleFileError: If the file is missing or damaged, or holds something else.
    """
    path = Path(data)
    if not data:
        raise SampleFileError("data must be a .npy or .npz file, got nothing")
    values, labels = _read_arrays(path, key or None, labels_key or None)
    if values.ndim < 2 or values.ndim > 4 or 0 in values.shape:
        raise SampleFileError(
            f"{path} must hold points [n, d] or images [n, h, w] or [n, c, h, w],"
            f" got shape {values.shape}"
        )
    _check_count(path, len(values), _LEAST)
    samples = _points(path, values) if values.ndim == 2 else _images(path, values)
    return split_at_random("arrays", samples, labels)


def _read_arrays(path: Path, key: str | None, labels_key: str | None) -> tuple[np.ndarray, Tensor]:
    if labels_key is None:
        values = read_array(path, key, "--arrays.key")
        return values, torch.zeros(len(values) if values.ndim else 0, dtype=torch.int64)
    if path.suffix != ".npz":
        raise SampleFileError(f"arrays.labels_key is for .npz files, got {path}")
    labels = read_array(path, labels_key)
    if key is None:
        with np.load(path, allow_pickle=False) as arrays:
            others = [name for name in arrays.files if name != labels_key]
        key = others[0] if len(others) == 1 else None
    values = read_array(path, key, "--arrays.key")
    if not values.ndim:
        raise SampleFileError(f"{path} must hold points or images, got a single number")
    if labels.dtype.kind not in "iu" or labels.shape != values.shape[:1]:
        raise SampleFileError(
            f"{path}: {labels_key} must be one integer for each of {len(values)} samples, got"
            f" {labels.dtype} of shape {labels.shape}"
        )
    # Any numbers will do for classes.
    return values, torch.from_numpy(np.unique(labels, return_inverse=True)[1]).to(torch.int64)


def _points(path: Path, values: np.ndarray) -> ScaledSamples:
    total, squares = 0.0, 0.0
    for chunk in _chunks(path, values):
        total = total + chunk.sum(0)
    mean = total / len(values)
    for chunk in _chunks(path, values):
        squares = squares + np.square(chunk - mean).sum(0)
    spread = torch.from_numpy(np.sqrt(np.asarray(squares) / len(values)))
    if not spread.any():
        raise SampleFileError(f"{path} must hold different points, got {len(values)} equal ones")
    scale = torch.where(spread > 0, 1 / spread, torch.ones(()).double())
    shift = -torch.from_numpy(np.asarray(mean)) * scale
    # In float64, or what is far from 0 would be rounded before it is centred.
    return ScaledSamples(_as_tensor(values, np.float64), scale, shift)


def _chunks(path: Path, values: np.ndarray) -> Iterator[np.ndarray]:
    """The values in float64, piece by piece; refuses what is not finite in float32."""
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        with np.errstate(over="ignore"):
            check_finite(path, chunk.astype(np.float32), start)
        yield chunk.astype(np.float64)


def _images(path: Path, values: np.ndarray) -> ScaledSamples:
    images = values[:, None] if values.ndim == 3 else values
    if images.shape[1] not in (1, 3):
        raise SampleFileError(
            f"{path} must hold images [n, h, w] or [n, c, h, w] with 1 or 3 channels, got shape"
            f" {values.shape}"
        )
    if images.dtype == np.uint8:
        return _from_bytes(_as_tensor(images))
    if images.dtype.kind not in "fb":
        raise SampleFileError(
            f"{path} must hold images of uint8 or floating point, got {images.dtype}"
        )
    low, high = np.inf, -np.inf
    for chunk in _chunks(path, images):
        low, high = min(low, chunk.min()), max(high, chunk.max())
    if low < -1 or high > 1:
        raise SampleFileError(
            f"{path} must hold images between 0 and 1 or between -1 and 1, got {low:g} to {high:g}"
        )
    signed = low < 0
    return ScaledSamples(_as_tensor(images), 1.0 if signed else 2.0, 0.0 if signed else -1.0)


def _as_tensor(values: np.ndarray, other: type = np.float32) -> Tensor:
    """The same memory where torch knows the type; else a copy of another one."""
    known = values.dtype in (np.uint8, np.float32, np.float64) and values.dtype.isnative
    return torch.from_numpy(values if known else values.astype(other))
