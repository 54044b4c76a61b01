"""``hessreg doctor``: versions, devices and self-tests."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch

import hessreg
from hessreg.commands._errors import FailedError
from hessreg.commands._options import new_parser
from hessreg.gan.progress import say
from hessreg.self_check import checked_devices, self_tests

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]

_PACKAGES = ("numpy", "scikit-learn", "safetensors", "matplotlib", "tensorboard", "rich")


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    purpose = "Show versions and devices, and test every operator where it runs."
    return new_parser(purpose)


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    _show_versions()
    tests = []
    for device in checked_devices():
        for test in self_tests(device):
            say(str(test))
            tests.append(test)
    if failed := [f"{test.operator} on {test.device}" for test in tests if test.failure]:
        raise FailedError(f"{len(failed)} of {len(tests)} self-tests fail: {', '.join(failed)}")


def _show_versions() -> None:
    for name, value in hessreg.build_info().items():
        say(f"{name}: {value}")
    for name in _PACKAGES:
        say(f"{name}: {_version(name)}")
    say(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        say(f"cuda:{index}: {torch.cuda.get_device_name(index)}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install 'hessreg[gan]')"
