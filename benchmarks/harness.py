"""How everything here is timed: warmed up, interleaved with its rivals, medians with spread."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import hessreg
from benchmarks.limits import Work, copying, floor_of, measured_limits
from benchmarks.tables import row_lines

Runs = dict[str, Callable[[], Any]]

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


# ---- a suite -----------------------------------------------------------------------------------


@dataclass
class Contest:
    """What is timed together, in one row of a table.

    Args:
        group: The table.
        case: The row.
        runs: The contestants, by name.
        ours: Which of them are ours; the first is the one that rivals are compared with.
        work: What ours must move and compute.
        references: Which of them are neither ours nor rivals.
        left_out: Who is not timed, and why.
        errors: Of the results.
        floor: The milliseconds that nobody could stay below, from the measured medians.
        cold: Read other memory before each run.
        again: Time a second call right after each.
        seconds: For each contestant, about.
        notes: Other figures of the row.
    """

    group: str
    case: str
    runs: Runs
    ours: Sequence[str]
    work: Work | None = None
    references: Sequence[str] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    floor: Callable[[dict[str, float]], float] | None = None
    cold: bool = False
    again: bool = False
    seconds: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Suite(ABC):
    """A family of benchmarks; a subclass says what is timed."""

    name = ""
    rounds = 60
    seconds = 1.0  # for each contestant of a case, about

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: str = args.device

    @abstractmethod
    def cases(self) -> list[Any]:
        """What is to be timed; little of it with ``--quick``."""

    @abstractmethod
    def contest(self, case: Any) -> Contest:
        """Prepares one case, and checks that all contestants agree."""

    def measured(self, case: Any, row: dict[str, Any]) -> None:  # noqa: B027 (most need not)
        """Takes note of what was measured."""

    def extras(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What else there is to measure, once, for the file."""
        return {}

    def admitted(self, runs: Runs, ours: Sequence[str], references: Sequence[str] = ()) -> Runs:
        """Who takes part: with ``--only-ours`` no rivals."""
        if not self.args.only_ours:
            return runs
        return {who: run for who, run in runs.items() if who in (*ours, *references)}

    def time(self, contest: Contest, limits: dict[str, Any]) -> dict[str, Any]:
        """Measures one row."""
        times = measure(
            contest.runs,
            rounds=self.args.rounds,
            device=self.device,
            cold=contest.cold,
            seconds=contest.seconds or self.args.seconds,
            again=contest.again,
        )
        medians = {who: t["median"] for who, t in times.items()}
        floor = floor_of(contest.work, limits, cold=contest.cold, device=self.device)
        if contest.floor is not None:
            floor = {"milliseconds": contest.floor(medians), "bound": "memory"}
        return {
            "group": contest.group,
            "case": contest.case,
            "ours": [who for who in contest.ours if who in times],
            "references": list(contest.references),
            "milliseconds": times,
            "left out": contest.left_out,
            "errors": contest.errors,
            "work": contest.work.to_dict() if contest.work else None,
            "floor": floor,
            "copy, milliseconds": copying(contest.work, limits),
            **contest.notes,
        }


def options(suite: type[Suite], more: Callable[[argparse.ArgumentParser], None]) -> Any:
    """The options that every suite takes, and those that ``more`` adds."""
    parser = argparse.ArgumentParser(description=(sys.modules[suite.__module__].__doc__ or "?"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=suite.rounds, help="at most")
    parser.add_argument("--seconds", type=float, default=suite.seconds, help="for each, about")
    parser.add_argument("--quick", action="store_true", help="few small cases, a few rounds")
    parser.add_argument("--case", default="", help="only what holds this in its title")
    parser.add_argument("--only-ours", action="store_true", help="no rivals")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    more(parser)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 5), min(args.seconds, 0.2)
    return args


def run_suite(
    suite: type[Suite], more: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> None:
    """Runs every case of a suite; what fails is named, and the rest goes on."""
    keep_memory()
    args = options(suite, more)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    card = machine(args.device)
    print(f"{card['processor']}, torch {card['torch']}, {args.threads} thread(s), {args.device}")
    head = {"machine": card, "threads": args.threads, "quick": args.quick}
    if args.json:
        check_file(args.json, head)
    limits = {} if args.only_ours else measured_limits(args.json, head, args.device)
    made = suite(args)
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {"cases": rows, **_when()}
    for case in made.cases():
        if args.case in str(case):
            rows.append(_row(made, case, limits))
            print(*row_lines(rows[-1]), sep="\n", flush=True)
            _keep(args.json, head, limits, made.name, results)
    results |= {} if args.only_ours or args.case else made.extras(rows)
    results["seconds"] = time.perf_counter() - start
    _keep(args.json, head, limits, made.name, results)
    sys.exit(any("failed" in row for row in rows))


def _row(suite: Suite, case: Any, limits: dict[str, Any]) -> dict[str, Any]:
    try:
        row = suite.time(suite.contest(case), limits)
    except Exception as error:  # the others are still to come
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return {"group": suite.name, "case": str(case), "failed": reason}
    suite.measured(case, row)
    return row


def _keep(path: Path | None, head: Any, limits: Any, name: str, results: Any) -> None:
    if path is not None:
        save(path, {**head, "limits": limits, "suites": {name: results}})


def _when() -> dict[str, Any]:
    """The moment and the commit; a star for one with changes."""
    root = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty=*", "--exclude=*"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        commit = done.stdout.strip()
    except OSError:
        commit = ""
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit or "unknown"}


# ---- timing ------------------------------------------------------------------------------------

_FLUSH_BYTES = 128 << 20  # more than the caches hold
_SLOW = 2.0  # seconds: who takes more runs once
_FEWEST = 3  # runs of everyone else
_SMALL = 1.0  # milliseconds: on a GPU, whoever takes less is replayed as a graph, too


def measure(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: str,
    cold: bool,
    seconds: float | None = None,
    again: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times callables in turn, round after round, so that a drifting machine drifts for all.

    Args:
        contestants: what to time, by name.
        rounds: how often each is timed.
        device: where they run.
        cold: read other memory before each run. Otherwise whoever comes after one that writes
            much pays for writing it back: up to 40 % of the time of an operation on large vectors.
            On a GPU that is always so.
        seconds: for each contestant, about: whoever is too slow for all rounds in that time runs
            in some of them only, evenly spread.
        again: time a second call right after each, too: it finds its code and data in the caches,
            from which the others have driven them before the first.

    Returns:
        For each name the ``median``, ``low`` and ``high`` quartile in milliseconds, with ``again``
        the median of the second calls under that name, and on a GPU, for what is small, under
        ``graph`` that of replaying it, or why it cannot be captured.
    """
    starts = {name: _warm_up(run, rounds, seconds, device) for name, run in contestants.items()}
    samples = {name: times for name, (times, _) in starts.items()}
    repeats: dict[str, list[float]] = {name: [] for name in contestants}
    flushed = cold or device != "cpu"
    other = torch.ones(_FLUSH_BYTES // 4 if flushed else 1, device=device)  # zeros share one page
    for i in range(rounds):
        taking_part = [n for n, (_, turns) in starts.items() if i * turns % rounds < turns]
        for name in taking_part:
            other.sum()
            samples[name].append(time_once(contestants[name], device))
            if again:
                repeats[name].append(time_once(contestants[name], device))
    found = {name: _summary(samples[name], repeats[name]) for name in contestants}
    if device != "cpu":
        _replay(contestants, found, rounds, device)
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


def _replay(contestants: Mapping[str, Any], found: Any, rounds: int, device: str) -> None:
    """Small calls once more as CUDA graphs, which leave out what the host does for them."""
    for name, run in contestants.items():
        if found[name]["median"] > _SMALL:
            continue
        try:
            replay = _captured(run)
        except Exception as error:  # whoever waits for the device cannot be captured
            found[name]["graph"] = f"cannot: {' '.join(str(error).split())[:80]}"
            continue
        times = [time_once(replay, device) for _ in range(rounds)]
        found[name]["graph"] = statistics.median(times)


def _captured(run: Callable[[], Any]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _summary(times: list[float], repeats: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else 3 * times
    again = {"again": statistics.median(repeats)} if repeats else {}
    return {"median": median, "low": low, "high": high, **again}


# ---- the machine -------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    card = {"processor": _processor(), "cores": os.cpu_count(), **hessreg.build_info()}
    if device != "cpu":
        card["gpu"] = torch.cuda.get_device_name()
        card["capability"] = list(torch.cuda.get_device_capability())
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
    """Writes JSON whole or not at all; suites of the file that are not in ``results`` stay."""
    others = json.loads(path.read_text()) if path.exists() else {}
    suites = {**others.get("suites", {}), **results["suites"]}
    text = _readable({**others, **results, "suites": suites})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def _readable(results: dict[str, Any]) -> str:
    """JSON with six digits of every number, and a line for each of the innermost groups."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    innermost = re.compile(r"[{\[][^{}\[\]]*[}\]]")
    lines = json.dumps(rounded, indent=1)
    return innermost.sub(lambda found: re.sub(r"\n *", " ", found[0]), lines) + "\n"


def check_file(path: Path, head: dict[str, Any]) -> None:
    """Ends the program if the file that is there is of something else."""
    if not path.exists():
        return
    try:
        fits = same_machine(json.loads(path.read_text()), head)
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        sys.exit(f"{path} is not of this machine and this kind of run: name another file")


def same_machine(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two files may be one."""
    cards = a["machine"], b["machine"]
    same = all(cards[0].get(name) == cards[1].get(name) for name in _SAME)
    return same and a["threads"] == b["threads"] and a["quick"] == b["quick"]
