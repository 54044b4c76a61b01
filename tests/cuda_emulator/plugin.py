"""pytest options for emulated kernels, and helpers for their tests."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("CUDA emulator")
    group.addoption(
        "--emu-check", action="store_true", help="check every memory access of emulated kernels"
    )
    group.addoption(
        "--emu-order",
        choices=("ascending", "descending", "random", "sticky"),
        help="the order in which the threads of emulated kernels take turns",
    )
    group.addoption("--emu-seed", type=int, help="the seed of the orders random and sticky")


def pytest_configure(config: pytest.Config) -> None:
    for option in ("order", "seed"):
        value = config.getoption(f"--emu-{option}")
        if value is not None:
            os.environ[f"HESSREG_EMU_{option.upper()}"] = str(value)


@contextlib.contextmanager
def configured(module: ModuleType, **options: Any) -> Iterator[None]:
    """Changes options of a module's emulator for a while."""
    before = module.emulator.configuration()
    module.emulator.configure(**options)
    try:
        yield
    finally:
        module.emulator.configure(**before)


def barrier_lines(source: Path) -> list[int]:
    """The lines of a kernel file that hold a barrier."""
    lines = source.read_text().splitlines()
    barrier = re.compile(r"^[^/]*\b(__syncthreads\w*|__syncwarp|grid_sync)\(")
    return [number for number, line in enumerate(lines, 1) if barrier.match(line)]


def redundant_barriers(module: ModuleType, source: Path, run: Callable[[], None]) -> list[int]:
    """Removes one barrier after the other; returns the lines of those that nothing misses.

    Args:
        module: A check build of the kernels.
        source: The kernel file.
        run: Runs the kernels, and fails if their results are wrong.
    """
    redundant = []
    for line in barrier_lines(source):
        skipped = module.emulator.statistics()["skipped_barriers"]
        with configured(module, skip_file=source.name, skip_line=line):
            try:
                run()
            except (AssertionError, RuntimeError):
                continue
        if module.emulator.statistics()["skipped_barriers"] == skipped:
            raise ValueError(f"{source.name}:{line}: this barrier was never reached")
        redundant.append(line)
    return redundant
