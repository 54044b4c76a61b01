"""Photographs to tensors and back, whatever the file holds."""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hessreg.gan.checkpoint import write_atomically
from hessreg.gan.checks import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MAX_PIXELS",
    "MAX_SIZE",
    "MIN_SIDE",
    "ImageError",
    "check_picture_path",
    "encode",
    "keep_colors",
    "load_image",
    "load_images",
    "save_image",
]

MAX_PIXELS = 80_000_000  # of a file; below the number at which Pillow itself warns
MIN_SIDE = 16  # pixels after scaling: what is left of it after four halvings is one
MAX_SIZE = 1024
_SAMPLES = {"sample:china": "china.jpg", "sample:flower": "flower.jpg"}
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_QUALITY: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
_LUMINANCE = 0.299, 0.587, 0.114  # ITU-R BT.601


class ImageError(ValueError):
    """An image cannot be read, or is not of a size that can be worked with."""


def load_image(path: str | Path, size: int = 256) -> Tensor:
    """Read a photograph and scale it down.

    Anything Pillow opens is taken: greyscale, palette and 16-bit files too; transparent ones are
    laid on white and the camera's orientation is followed. Nothing is ever enlarged.

    Args:
        path: The file; or ``sample:china``, ``sample:flower``, the photographs that come with
            scikit-learn.
        size: Pixels of the longer side, unless the file has fewer; in [32, 1024].

    Returns:
        ``[1, 3, height, width]``, float32 in [0, 1].

    Raises:
        ImageError: If there is no such file, it is not an image, is damaged, has more than 80
            million pixels, or a side would have fewer than 16.
        ValueError: If the size is out of range.

    Example:
        >>> load_image("sample:china", size=64).shape
        torch.Size([1, 3, 43, 64])
    """
    require(32 <= size <= MAX_SIZE, "size", f"in [32, {MAX_SIZE}]", size)
    file = _sample(str(path)) if str(path).startswith("sample:") else Path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on odd files it can read nevertheless
        image = _open(file, size)
    array = np.array(image, dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0).contiguous()


def load_images(path: str | Path, size: int = 256) -> list[Tensor]:
    """Read all photographs in a folder, in the order of their names, or the one of a file.

    Args:
        path: The folder or the file.
        size: As for `load_image`.

    Returns:
        Each ``[1, 3, height, width]``.

    Raises:
        ImageError: If there are none, or one of them cannot be used.
        ValueError: If the size is out of range.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [load_image(path, size)]
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _FORMATS)
    if not files:
        raise ImageError(f"no {', '.join(_FORMATS)} file in the folder {folder}")
    return [load_image(file, size) for file in files]


def _sample(name: str) -> Path:
    if name not in _SAMPLES:
        raise ImageError(f"no photograph {name}: there are {', '.join(_SAMPLES)}")
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="scikit-learn")
    return Path(spec.origin).parent / "datasets" / "images" / _SAMPLES[name]


def _open(file: Path, size: int) -> Image:
    """Open, check and scale; 8-bit RGB."""
    from PIL import Image, UnidentifiedImageError

    if file.is_dir():
        raise ImageError(f"{file} is a folder, not an image")
    try:
        with Image.open(file) as image:
            _check_extent(file, image.size, size)
            return _decode(image, size)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"no image at {file}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{file} is not an image of a format that Pillow knows") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{file} has more than {MAX_PIXELS:,} pixels, the limit") from None
    except Exception as error:  # decoders of damaged files raise anything
        raise ImageError(f"{file} cannot be read: {error}") from None


def _check_extent(file: Path, extent: tuple[int, int], size: int) -> None:
    width, height = extent
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{file} has {width} x {height} = {width * height:,} pixels; the limit is"
            f" {MAX_PIXELS:,}"
        )
    if min(_scaled(extent, size)) < MIN_SIDE:
        width, height = _scaled(extent, size)
        raise ImageError(
            f"{file} is {extent[0]} x {extent[1]} pixels, {width} x {height} at size {size};"
            f" each side must have at least {MIN_SIDE}"
        )


def _scaled(extent: tuple[int, int], size: int) -> tuple[int, int]:
    factor = min(1.0, size / max(extent))
    return max(1, round(factor * extent[0])), max(1, round(factor * extent[1]))


def _decode(image: Image, size: int) -> Image:
    from PIL import Image as Pillow
    from PIL import ImageOps

    extent = image.size
    image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at half its size, or less
    scaled = _eight_bits(image).resize(_scaled(extent, size), Pillow.Resampling.LANCZOS)
    upright = ImageOps.exif_transpose(scaled).convert("RGBA")
    white = Pillow.new("RGBA", upright.size, "white")
    return Pillow.alpha_composite(white, upright).convert("RGB")


def _eight_bits(image: Image) -> Image:
    """As RGB, or RGBA if parts are transparent."""
    from PIL import Image as Pillow

    if image.mode.startswith(("I", "F")):
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        values = np.asarray(image, dtype=np.float64) / 65535
        image = Pillow.fromarray((255 * values.clip(0, 1)).round().astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def check_picture_path(path: Path) -> None:
    """Refuse a file that a picture could not be written to, before the work is done.

    Raises:
        ImageError: If it is a folder, in a folder that is missing or cannot be written, or of
            another format than PNG, JPEG and WebP.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ImageError(f"{path} must end in {', '.join(_FORMATS)}")
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not a file to write")
    if not path.parent.is_dir():
        raise ImageError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ImageError(f"{path} cannot be written: the folder {path.parent} is read-only")


def save_image(path: Path, image: Tensor) -> None:
    """Write a picture, atomically; what is outside [0, 1] is cut off.

    Args:
        path: The file; PNG, JPEG or WebP by its ending.
        image: ``[1, 3, height, width]``.

    Raises:
        ImageError: If the file cannot be written, or its ending is another.
    """
    check_picture_path(path)
    write_atomically(path, encode(image, _FORMATS[path.suffix.lower()]))


def encode(image: Tensor, kind: str = "PNG") -> bytes:
    """The content of a file of a picture ``[1, 3, height, width]``."""
    from PIL import Image as Pillow

    pixels = image.detach().float().cpu()[0].permute(1, 2, 0).clamp(0, 1).mul(255).round()
    buffer = io.BytesIO()
    Pillow.fromarray(pixels.numpy().astype(np.uint8)).save(buffer, kind, **_QUALITY.get(kind, {}))
    return buffer.getvalue()


def keep_colors(result: Tensor, content: Tensor) -> Tensor:
    """The luminance of one picture with the colours of another (Gatys et al. 2016).

    Args:
        result: ``[1, 3, height, width]``, where the luminance is from.
        content: Of the same shape, where blue and red differences (Y'CbCr) are from.

    Returns:
        ``[1, 3, height, width]`` in [0, 1].

    Example:
        >>> grey, red = torch.full((1, 3, 16, 16), 0.299), torch.zeros(1, 3, 16, 16)
        >>> red[:, 0] = 1
        >>> torch.allclose(keep_colors(grey, red), red, atol=1e-6)
        True
    """
    weights = torch.tensor(_LUMINANCE, dtype=result.dtype, device=result.device).view(1, 3, 1, 1)
    change = (weights * (result - content)).sum(1, keepdim=True)
    return (content + change).clamp(0, 1)
