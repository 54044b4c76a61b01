"""The build's options, the choice of a backend, and the CPU kernels of every instruction set."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hessreg

ROOT = Path(__file__).resolve().parent.parent

FAMILIES = ["gaussian", "hvp", "projection", "spectral"]
KERNEL_TESTS = [f"tests/test_{family}.py" for family in FAMILIES]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


PROJECT = "import torch, hessreg; x = torch.ones(3); print(hessreg.project_orthogonal(x, x).sum())"
BACKEND = "import hessreg; print(hessreg.build_info()['backend'])"


def test_build_info_says_what_runs():
    info = hessreg.build_info()
    assert info["libraries"]["_C"] == "loaded"
    assert info["backend"].startswith("cpu")
    assert info["build"]["torch_abi"] == "2.11"


@pytest.mark.parametrize(("wish", "runs"), [("reference", "reference"), ("cpu", "cpu")])
def test_environment_chooses_the_backend(wish, runs):
    result = run_python(BACKEND, HESSREG_BACKEND=wish)
    assert result.stdout.strip() == runs
    assert run_python(PROJECT, HESSREG_BACKEND=wish).stdout.strip() == "tensor(0.)"


def test_unknown_backend_is_refused():
    assert "must be one of auto, reference, cpu, cuda, got 'gpu'" in (
        run_python(BACKEND, HESSREG_BACKEND="gpu").stderr
    )
    with pytest.raises(ValueError, match="name must be 'auto' or 'reference', got 'gpu'"):
        hessreg.backend("gpu").__enter__()


WITHOUT_LIBRARY = "import sys; sys.modules['hessreg._C'] = None; "


def test_missing_library_falls_back_with_one_warning():
    result = run_python(WITHOUT_LIBRARY + PROJECT + "; " + BACKEND)
    assert result.stdout.split() == ["tensor(0.)", "reference"]
    assert result.stderr.count("RuntimeWarning: hessreg falls back") == 1


def test_missing_library_is_an_error_where_it_is_asked_for():
    result = run_python(WITHOUT_LIBRARY + PROJECT, HESSREG_BACKEND="cpu")
    assert "ImportError: HESSREG_BACKEND=cpu, but hessreg._C:" in result.stderr


def test_missing_cuda_library_warns_only_where_it_is_missed():
    pretend = "import torch; torch.version.cuda = '13.0'; import sys; "
    pretend += "sys.modules['hessreg._cuda'] = None; "
    result = run_python(pretend + PROJECT + "; " + BACKEND)
    assert result.stdout.split() == ["tensor(0.)", "cpu"]
    assert result.stderr == ""


def test_cuda_backend_needs_its_library():
    code = "import sys; sys.modules['hessreg._cuda'] = None; " + BACKEND
    assert (
        "HESSREG_BACKEND=cuda, but hessreg._cuda:"
        in run_python(code, HESSREG_BACKEND="cuda").stderr
    )


def test_overlapping_reference_blocks_leave_nothing_behind():
    first, second = hessreg.backend("reference"), hessreg.backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert hessreg.build_info()["backend"] == "reference"
    second.__exit__(None, None, None)
    assert hessreg.build_info()["backend"] != "reference"


def test_versions_agree():
    assert importlib.metadata.version("hessreg") == hessreg.__version__


def test_unknown_instruction_set_is_refused():
    error = run_python(BACKEND, HESSREG_ISA="sse9").stderr
    assert "ValueError: HESSREG_ISA must be baseline, avx2 or avx512" in error


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_kernels_of_lesser_instruction_sets(isa):
    reported = run_python(
        "import hessreg; print(hessreg.build_info()['build']['isa'])", HESSREG_ISA=isa
    )
    assert reported.stdout.strip() == isa
    chosen = "cpu and not emulated and not every_check and not registration and not _op"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *KERNEL_TESTS],
        env={**os.environ, "HESSREG_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"cpu +(\d+) passed", result.stdout)[1]) > 150


@pytest.fixture
def setup_module(monkeypatch):
    spec = importlib.util.spec_from_file_location("hessreg_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("HESSREG_CUDA", "FORCE_CUDA", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HESSREG_CUDA": "yes"}, "HESSREG_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"FORCE_CUDA": "1", "HESSREG_CUDA": "0"}, "FORCE_CUDA=1 contradicts HESSREG_CUDA=0"),
        ({"FORCE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "there is no nvcc in /nowhere"),
        ({"HESSREG_CUDA": "1", "CUDA_HOME": "/nowhere"}, "there is no nvcc in /nowhere"),
    ],
)
def test_impossible_builds_fail(setup_module, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        setup_module.resolve_nvcc()


def test_cuda_is_left_out_where_there_is_none(setup_module, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert setup_module.resolve_nvcc() is None


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [("9.0", "90-real"), ("8.0;9.0+PTX", "80-real;90"), ("8.6 9.0a", "86-real;90a-real")],
)
def test_architectures_in_cmake_spelling(setup_module, arch_list, expected):
    assert setup_module.cmake_architectures(arch_list) == expected


def test_wrong_architecture_is_named(setup_module):
    with pytest.raises(SystemExit, match=r"expected items such as 9.0\+PTX, got 'hopper'"):
        setup_module.cmake_architectures("hopper")
