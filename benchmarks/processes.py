"""Jobs that need a process of their own: peaks of memory, and the allocator as it comes."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import as_it_comes


def giving_memory_back() -> dict[str, str]:
    """The environment of a program that returns memory at once, so that its peaks are seen."""
    return {**as_it_comes(), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def alone(module: str, arguments: list[str], env: dict[str, str]) -> Any:
    """Runs a module in a new process and reads the JSON that it prints last."""
    command = [sys.executable, "-m", module, "--alone", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"left out": "cannot: " + (done.stderr.strip().splitlines() or ["?"])[-1][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def peak_growth(run: Callable[[], Any], device: str) -> int:
    """The most bytes that a run has in use beyond those before it."""
    before = _start(device)
    run()
    if device != "cpu":
        return torch.cuda.max_memory_allocated() - before
    return _status("VmHWM:") - before


def _start(device: str) -> int:
    """Bytes in use now, from where the peak starts."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS:")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
