"""Data sets in files, made from the digits that come with scikit-learn."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def digits(size: int = 28, count: int = 1797) -> tuple[np.ndarray, np.ndarray]:
    """Images ``uint8[n, size, size]`` and labels ``uint8[n]``."""
    bunch = load_digits()
    small = (bunch.images[:count] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((size, size))) for image in small]
    return np.stack(large), bunch.target[:count].astype(np.uint8)


def idx_bytes(values: np.ndarray) -> bytes:
    """The IDX format, as Y. LeCun's page describes it."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def write_idx(folder: Path, count: int = 1797, tests: int = 300, packed: bool = False) -> Path:
    """A folder as MNIST's, with the last so many of the images as tests."""
    folder.mkdir(exist_ok=True)
    images, labels = digits(count=count)
    splits = {"train": slice(0, count - tests), "t10k": slice(count - tests, count)}
    for split, rows in splits.items():
        if tests == 0 and split == "t10k":
            continue
        for kind, values in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
            content = idx_bytes(values)
            name = f"{split}-{kind}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_images(folder: Path, count: int = 120, classes: bool = False) -> Path:
    """A folder of PNG and JPEG images of several sizes and modes, in colour."""
    images, labels = digits(36, count)
    for number, (grey, label) in enumerate(zip(images, labels, strict=True)):
        target = folder / str(label) if classes else folder
        target.mkdir(parents=True, exist_ok=True)
        colour = np.stack([grey, 255 - grey, grey // 2], -1)[: 30 + number % 7]
        kind = "jpg" if number % 2 else "png"
        Image.fromarray(colour).save(target / f"{number:04d}.{kind}")
    return folder
