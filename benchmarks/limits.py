"""What a machine can do at most, measured, and what that means for an operation.

The floor of an operation is the time that its unavoidable memory traffic takes, or its unavoidable
arithmetic, whichever is longer. Each input is read and each output is written once, at the speed of
reading memory of that size; multiply-adds and exponentials run on the same units of a CPU, so their
times add up there; on a GPU they overlap.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

HERE = Path(__file__).resolve().parent
_SIZES = [1 << k for k in (14, 17, 20, 22, 24, 25, 26, 28)]  # bytes; the last is far from caches
_GPU_BYTES = 1 << 30


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without.

    Args:
        bytes: Of input and output.
        flops: Sums and products, two for a multiply-add.
        exps: Exponentials.
        dtype: What it computes in.
    """

    bytes: float
    flops: float = 0.0
    exps: float = 0.0
    dtype: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        """As a file has it."""
        return asdict(self)


class _Counter(TorchDispatchMode):
    """Torch's FlopCounterMode without its modules, which cannot differentiate twice."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def counted_work(run: Callable[[], Any], tensors: Sequence[torch.Tensor]) -> Work:
    """The products and convolutions of torch in a run, and the memory of what it is about.

    Elementwise operations and those of our own operators are not counted: the floor is lower.
    """
    with _Counter() as counter:
        run()
    num_bytes = sum(t.numel() * t.element_size() for t in tensors)
    return Work(bytes=2 * num_bytes, flops=counter.flops)


def floor_of(
    work: Work | None, limits: dict[str, Any], *, cold: bool, device: str
) -> dict[str, Any] | None:
    """The least milliseconds that the work can take, and what bounds it; None if unknown."""
    if work is None or not limits:
        return None
    memory = work.bytes / _bandwidth(limits["read"], work.bytes, cold)
    adds = work.flops / limits[f"{work.dtype} flops"]
    exps = work.exps / limits[f"{work.dtype} exps"] if work.exps else 0.0
    arithmetic = max(adds, exps) if device != "cpu" else adds + exps
    bound = "exponentials" if exps > adds else "multiply-adds"
    return {
        "milliseconds": 1e3 * max(memory, arithmetic),
        "bound": "memory" if memory >= arithmetic else bound,
    }


def copying(work: Work | None, limits: dict[str, Any]) -> float | None:
    """The milliseconds that a copy takes to move as many bytes, far from the caches."""
    return 1e3 * work.bytes / limits["copied"][-1][1] if work and limits else None


def _bandwidth(sizes: list[list[float]], num_bytes: float, cold: bool) -> float:
    """Bytes a second from where so much memory fits in, at best."""
    if cold:
        return sizes[-1][1]
    fitting = [rate for size, rate in sizes if size <= num_bytes]
    return fitting[-1] if fitting else sizes[0][1]


def measured_limits(path: Path | None, head: dict[str, Any], device: str) -> dict[str, Any]:
    """Those in a file of the same machine, or measured now; empty where no compiler is."""
    if path is not None and path.exists():
        found = json.loads(path.read_text())
        same = found.get("machine") == head["machine"] and found["threads"] == head["threads"]
        if same and found.get("limits"):
            return found["limits"]
    return measure_limits(device, head["threads"])


def measure_limits(device: str, threads: int) -> dict[str, Any]:
    """Operations, exponentials and bytes a second; empty where it cannot be compiled."""
    try:
        library = ctypes.CDLL(str(_compiled(device)))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"limits: not measured, {error}")
        return {}
    limits: dict[str, Any] = {
        f"{dtype} flops": _rate(library, f"multiply_adds_{kind}")(threads)
        for dtype, kind in (("float32", "float"), ("float64", "double"))
    }
    limits["float32 exps"] = _rate(library, "exponentials_float")(threads)
    if device != "cpu":
        return limits | _gpu_traffic()
    limits["float64 exps"] = _rate(library, "exponentials_double")(threads)
    for name in ("read", "copied"):
        traffic = _rate(library, f"{name}_bytes")
        limits[name] = [[size, traffic(threads, ctypes.c_int64(size))] for size in _SIZES]
    return limits


def _rate(library: ctypes.CDLL, name: str) -> Callable[..., float]:
    function = getattr(library, name)
    function.restype = ctypes.c_double
    return function


def _gpu_traffic() -> dict[str, Any]:
    """By torch's own copy; reading alone is not measured apart."""
    a, b = (torch.empty(_GPU_BYTES // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    best = 0.0
    for _ in range(10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        stop.record()
        stop.synchronize()
        best = max(best, 1e3 * _GPU_BYTES / start.elapsed_time(stop))
    return {"read": [[_GPU_BYTES, best]], "copied": [[_GPU_BYTES, best]]}


def _compiled(device: str) -> Path:
    """The library with the loops, for this processor or this GPU."""
    command = _compiler() if device == "cpu" else _cuda_compiler()
    source = HERE / ("limits.cpp" if device == "cpu" else "limits.cu")
    text = source.read_bytes() + " ".join(command).encode()
    name = f"hessreg-limits-{os.getuid()}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    path = Path(tempfile.gettempdir()) / name
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(source), "-o", str(unfinished)], check=True)
        unfinished.replace(path)
    return path


def _compiler() -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "c++"
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-Wno-psabi"]
    include = f"-I{HERE.parent / 'csrc' / 'common'}"
    return [compiler, *flags, "-shared", "-fPIC", "-pthread", include]


def _cuda_compiler() -> list[str]:
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc") or "nvcc"
    major, minor = torch.cuda.get_device_capability()
    return [nvcc, "-O3", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
