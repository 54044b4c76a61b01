"""Compiles CUDA kernels with the emulator into a Python extension module.

Everything lands in ``build/emulator`` under names that hold a hash of what went in: sources,
headers, flags and compiler. What exists is never built again.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parent.parent
BUILD = ROOT / "build" / "emulator"

_ENGINE = (
    *("barriers.cpp", "checker.cpp", "engine.cpp", "fibers.cpp", "hooks.cpp", "profile.cpp"),
    *("python_module.cpp", "reports.cpp", "schedule.cpp", "shared_memory.cpp", "warp.cpp"),
)
_INCLUDE_FOLDERS = (EMULATOR, ROOT / "csrc")
_COMMON_FLAGS = (
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    *(f"-I{folder}" for folder in _INCLUDE_FOLDERS),
)
_ENGINE_FLAGS = ("-O2",)
_BINDING_FLAGS = ("-O1",)
_KERNEL_FLAGS = {
    False: ("-O2", "-x", "c++"),
    True: (
        *("-O1", "-g1", "-x", "c++"),
        # The hooks of the emulator take the place of the sanitizers' libraries.
        *("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
        "-fsanitize=alignment,bounds-strict,signed-integer-overflow,shift",
        # Keep the accesses of structs in memory whole, as a vector load is one access.
        *("-fno-tree-sra", "-fno-ipa-sra"),
    ),
}
_NO_DEFINES: Mapping[str, str] = MappingProxyType({})


def load(
    name: str,
    sources: Sequence[Path],
    *,
    check: bool = False,
    defines: Mapping[str, str] = _NO_DEFINES,
) -> ModuleType:
    """Builds an extension module of emulated kernels, if need be, and imports it.

    Args:
        name: Name of the module.
        sources: Kernel files (``.cu``), and one binding (``.cpp``, see ``numpy_arguments.hpp``).
        check: Have every memory access of the kernel files checked; slower.
        defines: Further macros.
    """
    return _load(name, tuple(sources), check, tuple(sorted(defines.items())))


@functools.cache
def _load(
    name: str, sources: tuple[Path, ...], check: bool, defines: tuple[tuple[str, str], ...]
) -> ModuleType:
    kernels = [path for path in sources if path.suffix == ".cu"]
    bindings = [path for path in sources if path.suffix != ".cu"]
    module_name = ("HESSREG_EMU_MODULE", name)
    # The order matters: of an inline function that several objects hold, the linker takes the first
    # copy. The engine's are not instrumented, and the kernels' check where the binding's would not.
    objects = [_compile(EMULATOR / file, _ENGINE_FLAGS, defines) for file in _ENGINE]
    objects += [_compile(path, _KERNEL_FLAGS[check], defines) for path in kernels]
    objects += [_compile(path, _BINDING_FLAGS, (*defines, module_name)) for path in bindings]
    return _import(name, _link(name, objects, "check" if check else "fast"))


def _import(name: str, path: Path) -> ModuleType:
    # pybind11 keeps modules by their full name: each variant needs its own.
    full_name = f"{path.parent.name}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(full_name, str(path))
    spec = importlib.util.spec_from_file_location(full_name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compile(source: Path, flags: Sequence[str], defines: tuple[tuple[str, str], ...]) -> Path:
    contents = [path.read_bytes() for path in sorted(_dependencies(source))]
    # A macro changes only the objects that mention it: all others are shared.
    macros = [
        f"-D{name}={value}"
        for name, value in defines
        if any(name.encode() in content for content in contents)
    ]
    command = [*compiler(), *_COMMON_FLAGS, *_library_flags(), *flags, *macros]
    key = _hash(_compiler_version().encode(), *(word.encode() for word in command), *contents)
    target = BUILD / "objects" / f"{source.stem}-{key}.o"
    return _build_once(target, lambda out: _run([*command, "-c", str(source), "-o", out]))


def _link(name: str, objects: Sequence[Path], variant: str) -> Path:
    key = _hash(name.encode(), *(path.name.encode() for path in objects))
    target = BUILD / f"{variant}-{key}" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [*compiler(), "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-ldl"]
    return _build_once(target, lambda out: _run([*command, "-o", out]))


def _build_once(target: Path, build: Callable[[str], None]) -> Path:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock")):
            if not target.exists():
                unfinished = target.with_name(target.name + ".tmp")
                build(str(unfinished))
                unfinished.rename(target)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _dependencies(source: Path) -> set[Path]:
    """The file and all of this project's headers that it includes, directly or not."""
    found: set[Path] = set()
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _included_by(path)
    return found


def _included_by(path: Path) -> Iterable[Path]:
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        candidates = (folder / name for folder in (path.parent, *_INCLUDE_FOLDERS))
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is not None:
            yield found.resolve()


@functools.cache
def compiler() -> tuple[str, ...]:
    """The host compiler: ``CXX``, or g++."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    if not command or shutil.which(command[0]) is None:
        raise RuntimeError(
            f"the CUDA emulator needs g++ 12 or later, but found no {shlex.join(command)!r}: "
            "install it or set CXX"
        )
    return tuple(command)


@functools.cache
def _compiler_version() -> str:
    command = [*compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def find_nvcc() -> str | None:
    """CUDA's compiler, from ``CUDA_HOME`` or the path; None where there is no toolkit."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


@functools.cache
def _library_flags() -> tuple[str, ...]:
    """Where headers of Python, pybind11 and, if there is one, the CUDA toolkit are."""
    import pybind11

    folders = [sysconfig.get_path("include"), pybind11.get_include(), *_toolkit_includes()]
    return tuple(word for folder in folders for word in ("-isystem", folder))


def _toolkit_includes() -> list[str]:
    nvcc = find_nvcc()
    if nvcc is None:
        return []
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    line = re.search(r'^#\$ INCLUDES="-I([^"]+)"', plan, re.MULTILINE)
    return [line.group(1)] if line else []
