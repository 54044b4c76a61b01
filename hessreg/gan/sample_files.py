"""Samples from files: NumPy arrays and folders of images."""

from __future__ import annotations

import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "SampleFileError",
    "check_finite",
    "image_files",
    "is_grey",
    "load_samples",
    "open_image",
    "read_array",
]

_MAPPED = 2**28  # bytes of a file from which on it is left on the disk
_IMAGES = (".png", ".jpg", ".jpeg")
_EIGHT_BITS = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
_MAGIC = (b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")  # an array; an archive; an empty one
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class SampleFileError(ValueError):
    """A file does not hold samples."""


def load_samples(path: Path, key: str | None = None) -> Tensor:
    """Read samples as points.

    Args:
        path: ``.npy`` or ``.npz`` (an array ``[n, ...]`` of numbers), or a folder of PNG or JPEG
            images of one size, which become numbers in [-1, 1].
        key: Name of the array in the ``.npz``; not needed if it holds a single one.

    Returns:
        ``[n, d]`` in float64, on the CPU.

    Raises:
        SampleFileError: If there are no samples, or some value is not finite.
    """
    samples = _read_folder(path) if path.is_dir() else read_array(path, key)
    if samples.ndim < 1 or len(samples) < 2 or samples.size == 0:
        raise SampleFileError(
            f"{path} must hold at least 2 samples [n, ...], got shape {samples.shape}"
        )
    check_finite(path, samples)
    return torch.from_numpy(samples.reshape(len(samples), -1).astype(np.float64))


def check_finite(path: Path, samples: np.ndarray, first: int = 0) -> None:
    """Refuse values that are not finite.

    Args:
        path: Where the samples are from.
        samples: ``[n, ...]``.
        first: Number of the first of them.

    Raises:
        SampleFileError: If there are any; says which and where.
    """
    bad = ~np.isfinite(samples)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        shown = (place[0] + first, *place[1:])
        raise SampleFileError(f"{path} holds {samples[place]} at {shown}")


def read_array(path: Path, key: str | None = None, option: str = "--key") -> np.ndarray:
    """Read an array of numbers, without pickle.

    Args:
        path: ``.npy`` or ``.npz``. A ``.npy`` file from 256 MiB on stays on the disk until its
            values are used.
        key: Name of the array in the ``.npz``; not needed if it holds a single one.
        option: What the user says the key with.

    Returns:
        The array, as it was stored.

    Raises:
        SampleFileError: If there is none, or its values are not real numbers.
    """
    array = _load_array(path, key, option)
    if array.dtype.kind not in "fiub":
        raise SampleFileError(f"{path} must hold real numbers, got dtype {array.dtype}")
    return array


def _load_array(path: Path, key: str | None, option: str) -> np.ndarray:
    if path.suffix not in (".npy", ".npz"):
        raise SampleFileError(
            f"{path} must be a .npy or .npz file or a folder of images"
            + ("" if path.exists() else ", and there is no such file")
        )
    try:
        with path.open("rb") as file:
            if not file.read(6).startswith(_MAGIC):
                raise SampleFileError(f"{path} is no NumPy file")
            if path.suffix == ".npy" and path.stat().st_size >= _MAPPED:
                return np.lib.format.open_memmap(path, mode="c")
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else _pick(path, loaded, key, option)
    except FileNotFoundError:
        raise SampleFileError(f"there is no file {path}") from None
    except (SampleFileError, MemoryError):
        raise
    except _DAMAGE as error:
        raise SampleFileError(f"{path} is not a readable array ({error})") from None


def _pick(path: Path, arrays: Any, key: str | None, option: str) -> np.ndarray:
    with arrays:
        if not arrays.files:
            raise SampleFileError(f"{path} holds no arrays")
        names = ", ".join(arrays.files)
        if key is None and len(arrays.files) != 1:
            raise SampleFileError(f"{path} holds several arrays: choose one with {option}: {names}")
        if key is not None and key not in arrays.files:
            raise SampleFileError(f"{path} has no array {key!r}, only {names}")
        name = arrays.files[0] if key is None else key
        array = arrays[name]
    if not isinstance(array, np.ndarray):
        raise SampleFileError(f"{path}: {name} is no array")
    return array


def image_files(path: Path) -> list[Path]:
    """Return the PNG and JPEG files in a folder, by name."""
    return sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)


def _read_folder(path: Path) -> np.ndarray:
    files = image_files(path)
    if not files:
        raise SampleFileError(f"{path} holds no images ({', '.join(_IMAGES)})")
    images = [_read_image(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise SampleFileError(
                f"images must have one size: {files[0]} has {_size(images[0])},"
                f" {file} has {_size(image)}"
            )
    return np.stack(images) / 127.5 - 1.0


def _read_image(file: Path) -> np.ndarray:
    """The image as ``uint8[height, width]`` or, in colour, ``uint8[height, width, 3]``."""
    with open_image(file) as image:
        return np.asarray(image.convert("L" if is_grey(image) else "RGB"))


@contextmanager
def open_image(file: Path) -> Iterator[Image]:
    """Open an image with 8-bit pixels.

    Raises:
        SampleFileError: If there is none, also while it is read.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode not in _EIGHT_BITS:
                raise SampleFileError(f"{file} has {image.mode} pixels, 8 bits wanted")
            yield image
    except (SampleFileError, MemoryError):
        raise
    except Exception as error:  # damaged metadata raises struct.error, ValueError and more
        raise SampleFileError(f"{file} is not a readable image ({error})") from None


def is_grey(image: Image) -> bool:
    """Return whether an image has no colours."""
    return image.mode in ("1", "L", "LA")


def _size(image: np.ndarray) -> str:
    colour = "colour" if image.ndim == 3 else "grey"
    return f"{image.shape[1]} x {image.shape[0]} pixels, {colour}"
