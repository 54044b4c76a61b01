"""How everything here is timed: warmed up, interleaved with its rivals, medians with spread."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import hessreg

# glibc gives large blocks back to the kernel after each call and zeroes them page by page in the
# next: 2-10 times the cost of the operation, the same for every contestant. Switched off for all.
_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 27),
}


def keep_memory() -> None:
    """Starts this program again with an allocator that keeps its memory, unless it has one."""
    if any(name not in os.environ for name in _ALLOCATOR):
        module = sys.modules["__main__"].__spec__.name
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **_ALLOCATOR})


def options(description: str) -> argparse.Namespace:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    return parser.parse_args()


_FLUSH_BYTES = 128 << 20  # more than the caches hold


def measure(
    contestants: Mapping[str, Callable[[], Any]], *, rounds: int, device: str, cold: bool
) -> dict[str, dict[str, float]]:
    """Times callables in turn, round after round, so that a drifting machine drifts for all.

    Args:
        contestants: what to time, by name.
        rounds: how often each is timed.
        device: where they run.
        cold: read other memory before each run. Otherwise whoever comes after one that writes
            much pays for writing it back: up to 40 % of the time of an operation on large vectors.

    Returns:
        For each name the ``median``, ``low`` and ``high`` quartile in milliseconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        for _ in range(3):
            run()
    other = torch.ones(_FLUSH_BYTES // 4 if cold else 1, device=device)  # zeros share one page
    for _ in range(rounds):
        for name, run in contestants.items():
            other.sum()
            samples[name].append(_time(run, device))
    return {name: _summary(times) for name, times in samples.items()}


def _time(run: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


def _summary(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": median, "low": low, "high": high}


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    card = {"processor": _processor(), "cores": os.cpu_count(), **hessreg.build_info()}
    if device != "cpu":
        card["gpu"] = torch.cuda.get_device_name()
        card["capability"] = torch.cuda.get_device_capability()
        card["cuda"] = torch.version.cuda
    return card


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    text = json.dumps(results, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)
