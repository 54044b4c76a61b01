"""All CUDA files compile with nvcc, without warnings and without register spills."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulator.build import EMULATOR, ROOT, find_nvcc

ARCHITECTURE = "sm_90"
SOURCES = [*sorted(ROOT.glob("csrc/*/*_cuda.cu")), *sorted(EMULATOR.glob("*/*_cuda.cu"))]
KERNEL_REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc on this machine")


def compile_verbosely(source: Path, folder: Path) -> str:
    """What ptxas says about the kernels of a file."""
    flags = ["-std=c++20", f"-arch={ARCHITECTURE}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    target = folder / f"{source.stem}.cubin"
    result = subprocess.run(
        [find_nvcc(), *flags, f"-I{ROOT / 'csrc'}", "-cubin", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stderr


def shared_bytes(report: re.Match) -> int:
    found = re.search(r"(\d+) bytes smem", report["rest"])
    return int(found.group(1)) if found else 0


def spills(report: re.Match) -> int:
    return int(report["stores"]) + int(report["loads"])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, tmp_path):
    reports = list(KERNEL_REPORT.finditer(compile_verbosely(source, tmp_path)))
    assert reports, "no kernel"
    for report in reports:
        print(
            f"{report['registers']:>4} registers {shared_bytes(report):>6} bytes shared "
            f"{spills(report):>4} bytes spilled  {report['kernel']}"
        )
    spilled = {report["kernel"]: spills(report) for report in reports}
    assert {kernel: size for kernel, size in spilled.items() if size > 0} == {}
