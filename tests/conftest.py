"""The backends every operator test runs on, and the count of what ran where."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

import pytest
import torch

import hessreg
from tests import emulated

BACKENDS = ("reference", "cpu", "cuda_emulated", "cuda")

pytest_plugins = ["tests.cuda_emulator.plugin"]


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.cuda] if name == "cuda" else []) for name in BACKENDS
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the tensors of a test live, with the backend under test serving that device."""
    name = request.param
    if name == "cuda" and "cuda" not in hessreg.build_info()["backend"]:
        pytest.fail("there is a CUDA device, but hessreg._cuda was not loaded")
    with serving(name, request):
        request.node.user_properties.append(("backend", name))
        yield torch.device("cuda" if name == "cuda" else "cpu")


def serving(name: str, request: pytest.FixtureRequest) -> contextlib.AbstractContextManager[None]:
    if name == "reference":
        return hessreg.backend("reference")
    if name == "cuda_emulated":
        return emulated.kernels(check=request.config.getoption("--emu-check"))
    return contextlib.nullcontext()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests on CUDA where there is no device."""
    if torch.cuda.is_available():
        return
    without = [item for item in items if item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many tests passed on each backend."""
    counts: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("passed", []):
        counts.update(value for key, value in report.user_properties if key == "backend")
    terminalreporter.section("tests by backend")
    for name in BACKENDS:
        absent = name == "cuda" and not torch.cuda.is_available()
        terminalreporter.line(f"{name:14s} {'no device' if absent else f'{counts[name]} passed'}")
