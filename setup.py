"""Builds the extension with CMake. Everything else is in pyproject.toml.

Environment: ``HESSREG_CUDA=auto|0|1`` (auto: on if nvcc is found), ``FORCE_CUDA=1`` (fail without
nvcc), ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST`` (such as ``"8.0;9.0+PTX"``), ``MAX_JOBS``,
``DEBUG=1``, ``HESSREG_WERROR=1`` (warnings are errors), and ``CXX`` as CMake reads it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME where that is set, else the one on the PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def resolve_nvcc() -> str | None:
    """The compiler to build the CUDA library with, or None to leave it out."""
    wish = os.environ.get("HESSREG_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"HESSREG_CUDA must be auto, 0 or 1, got {wish!r}")
    forced = wish == "1" or os.environ.get("FORCE_CUDA", "0") == "1"
    if forced and wish == "0":
        raise SystemExit("FORCE_CUDA=1 contradicts HESSREG_CUDA=0")
    nvcc = None if wish == "0" else find_nvcc()
    if forced and nvcc is None:
        where = os.environ.get("CUDA_HOME", "the PATH")
        raise SystemExit(f"a CUDA build was asked for, but there is no nvcc in {where}")
    return nvcc


def cmake_architectures(arch_list: str) -> str:
    """CMake's spelling of a TORCH_CUDA_ARCH_LIST.

    >>> cmake_architectures("8.0;9.0+PTX")
    '80-real;90'
    """
    names = []
    for name in re.split(r"[;, ]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected items such as 9.0+PTX, got {name!r}")
        major, minor, variant, ptx = match.groups()
        names.append(f"{major}{minor}{variant}" + ("" if ptx else "-real"))
    return ";".join(names)


def torch_folder() -> Path:
    """Where torch is installed, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch must be installed to build without isolation")
    return Path(spec.origin).parent


def resolved_options() -> dict[str, object]:
    """What this build does: printed, and compiled in for hessreg.build_info()."""
    nvcc = resolve_nvcc()
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCH_LIST
    return {
        "cuda": nvcc is not None,
        "nvcc": nvcc,
        "cuda_architectures": arch_list if nvcc else None,
        "debug": os.environ.get("DEBUG", "0") == "1",
        "built_with_torch": importlib.metadata.version("torch"),
        "torch_abi": "2.11",
    }


class CMakeBuild(build_ext):
    """Builds all libraries in one run of CMake."""

    def build_extensions(self) -> None:
        """Configures and builds into the package folder of the build."""
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        options = resolved_options()
        print("hessreg build:", json.dumps(options), flush=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        for stale in output.glob("_*.abi3.so"):  # of a build with other options
            stale.unlink()
        definitions = self._definitions(output, options)
        self._cmake("--fresh", "-S", str(ROOT), "-B", str(build), *definitions)
        self._cmake("--build", str(build), "-j", os.environ.get("MAX_JOBS") or str(os.cpu_count()))

    def _definitions(self, output: Path, options: dict[str, object]) -> list[str]:
        values: dict[str, object] = {
            "CMAKE_BUILD_TYPE": "Debug" if options["debug"] else "Release",
            "TORCH_DIR": torch_folder(),
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "HESSREG_OUTPUT_DIR": output,
            "HESSREG_CUDA": "ON" if options["cuda"] else "OFF",
            "HESSREG_WERROR": os.environ.get("HESSREG_WERROR", "OFF"),
            "HESSREG_BUILD_OPTIONS": json.dumps(options).replace(";", " "),
        }
        if options["cuda"]:
            values["CMAKE_CUDA_COMPILER"] = options["nvcc"]
            values["CMAKE_CUDA_ARCHITECTURES"] = cmake_architectures(
                str(options["cuda_architectures"])
            )
        return ["-G", "Ninja", *(f"-D{name}={value}" for name, value in values.items())]

    def _cmake(self, *arguments: str) -> None:
        # The environment's own cmake and ninja first, also where it has not been activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=path)
        if cmake is None or shutil.which("ninja", path=path) is None:
            raise SystemExit("cmake and ninja are needed to build: pip install cmake ninja")
        try:
            subprocess.run([cmake, *arguments], check=True, env={**os.environ, "PATH": path})  # noqa: S603
        except subprocess.CalledProcessError as error:
            hint = " (HESSREG_CUDA=0 builds without CUDA)" if resolve_nvcc() else ""
            raise SystemExit(f"cmake failed with exit code {error.returncode}{hint}") from None


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(f"hessreg.{name}", sources=[], py_limited_api=True)
            for name in (["_C", "_cuda"] if resolve_nvcc() else ["_C"])
        ],
        cmdclass={"build_ext": CMakeBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
