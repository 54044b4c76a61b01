"""How everything here is timed: warmed up, interleaved with its rivals, medians with spread."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
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


def as_it_comes() -> dict[str, str]:
    """The environment of a program whose allocator is left alone."""
    return {name: value for name, value in os.environ.items() if name not in _ALLOCATOR}


def options(
    description: str, more: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """The options that every benchmark takes, and those that ``more`` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    if more is not None:
        more(parser)
    return parser.parse_args()


def run_cases(
    description: str,
    cases: Iterable[Any],
    run: Callable[[Any, int, str], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> tuple[argparse.Namespace, dict[str, Any], list[dict[str, Any]]]:
    """Runs and shows every case; returns the options, the machine and the results."""
    keep_memory()
    args = options(description)
    torch.set_num_threads(args.threads)
    card = machine(args.device)
    print(f"{card['processor']}, torch {card['torch']}, {args.threads} thread(s), {args.device}")
    results = []
    for case in cases:
        results.append(run(case, args.rounds, args.device))
        show(results[-1])
    return args, card, results


_FLUSH_BYTES = 128 << 20  # more than the caches hold
_SLOW = 5.0  # seconds: who takes more runs once
_FEWEST = 3  # runs of everyone else


def measure(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: str,
    cold: bool,
    seconds: float | None = None,
    again: bool = False,
) -> dict[str, dict[str, float]]:
    """Times callables in turn, round after round, so that a drifting machine drifts for all.

    Args:
        contestants: what to time, by name.
        rounds: how often each is timed.
        device: where they run.
        cold: read other memory before each run. Otherwise whoever comes after one that writes
            much pays for writing it back: up to 40 % of the time of an operation on large vectors.
        seconds: for each contestant, about: whoever is too slow for all rounds in that time runs
            in some of them only, evenly spread.
        again: time a second call right after each, too: it finds its code and data in the caches,
            from which the others have driven them before the first.

    Returns:
        For each name the ``median``, ``low`` and ``high`` quartile in milliseconds, and with
        ``again`` the median of the second calls under that name.
    """
    samples: dict[str, list[float]] = {}
    repeats: dict[str, list[float]] = {name: [] for name in contestants}
    turns: dict[str, int] = {}
    for name, run in contestants.items():
        samples[name], turns[name] = _warm_up(run, rounds, seconds, device)
    other = torch.ones(_FLUSH_BYTES // 4 if cold else 1, device=device)  # zeros share one page
    for i in range(rounds):
        for name, run in contestants.items():
            if i * turns[name] % rounds < turns[name]:
                other.sum()
                samples[name].append(time_once(run, device))
                if again:
                    repeats[name].append(time_once(run, device))
    found = {name: _summary(times) for name, times in samples.items()}
    for name, times in repeats.items():
        if times:
            found[name]["again"] = statistics.median(times)
    return found


def _warm_up(
    run: Callable[[], Any], rounds: int, seconds: float | None, device: str
) -> tuple[list[float], int]:
    """The samples that there are after the first runs, and how many rounds to take part in."""
    first = time_once(run, device)
    if seconds is None:
        run(), run()
        return [], rounds
    if first > 1e3 * _SLOW:
        return [first], 0
    second = time_once(run, device) if first < 1e3 * seconds / 2 else first
    return [], min(rounds, max(_FEWEST, int(1e3 * seconds / second)))


def time_once(run: Callable[[], Any], device: str) -> float:
    """The milliseconds of one call."""
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
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else 3 * times
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


_SAME = ("processor", "cores", "gpu", "torch")  # of a card: what is measured on one machine


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes JSON whole or not at all.

    Of a file that is there, what ``results`` has is replaced; what else it holds stays, if it was
    measured on the same machine with as many threads.
    """
    others = json.loads(path.read_text()) if path.exists() else {}
    if others and not _same_machine(others, results):
        print(f"{path} was of another machine and is written anew")
        others = {}
    text = json.dumps({**others, **results}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def _same_machine(a: dict[str, Any], b: dict[str, Any]) -> bool:
    cards = a["machine"], b["machine"]
    same = all(cards[0].get(name) == cards[1].get(name) for name in _SAME)
    return same and a["threads"] == b["threads"]
