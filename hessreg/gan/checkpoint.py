"""Nested state to one safetensors file and back, without pickle.

Tensors are stored as tensors. Everything else is JSON in the file's own header, so weights and
plain state can never come from different moments.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CheckpointError",
    "load_state",
    "naming",
    "num_bytes",
    "save_state",
    "write_atomically",
]

_TENSOR = "__tensor__"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another configuration."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a failed write say which file it was: a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that, whenever the process is killed, is either the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def num_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dictionaries and lists.

    Example:
        >>> num_bytes({"a": [torch.zeros(3), 1], "b": torch.zeros(2, dtype=torch.uint8)})
        14
    """
    if isinstance(value, Tensor):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value
    return sum(map(num_bytes, inner)) if isinstance(value, dict | list | tuple) else 0


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of nested dictionaries and lists to ``tensors``, leaving references."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {str(k): _pack(v, f"{name}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]].clone()  # aligned memory, owned by the caller
        return {k: _unpack(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    return value


def _digest(plain: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of everything in a checkpoint; the format itself has no checksum."""
    digest = hashlib.sha256(plain.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dictionaries and lists of tensors and plain values, atomically.

    Keys come back as strings and tuples as lists.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_pack(state, "state", tensors))
    digest = _digest(plain, tensors)
    write_atomically(path, save(tensors, metadata={"state": plain, "sha256": digest}))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, on the CPU.

    Raises:
        CheckpointError: If there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _digest(metadata["state"], tensors):
            raise CheckpointError("wrong checksum")
        state = _unpack(json.loads(metadata["state"]), tensors)
        if not isinstance(state, dict):
            raise CheckpointError("not a state")
        return state
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error})") from None
