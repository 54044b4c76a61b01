"""What the benchmarks make of their measurements: ratios, floors, verdicts, tables and files."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch

from benchmarks import (
    bench_training,
    compare,
    harness,
    instructions,
    limits,
    report,
    summary,
    tables,
    targets,
)
from benchmarks.limits import HERE, Work, floor_of

for package in ("jsonargparse", "matplotlib", "sklearn"):
    pytest.importorskip(package)

from hessreg.cli import main  # noqa: E402
from hessreg.commands import bench  # noqa: E402

LIMITS = {
    "read": [[1000, 4e9], [1_000_000, 2e9], [100_000_000, 1e9]],
    "copied": [[1000, 2e9], [100_000_000, 1e9]],
    "float32 flops": 1e10,
    "float32 exps": 1e9,
}


def times(**medians):
    return {who: {"median": t, "low": 0.9 * t, "high": 1.1 * t} for who, t in medians.items()}


def row(**changes):
    made = {
        "group": "lists",
        "case": "one",
        "ours": ["hessreg"],
        "references": ["unit"],
        "milliseconds": times(hessreg=2.0, fast=1.0, slow=8.0, unit=0.5),
        "left out": {"keops": "missing: not installed"},
        "errors": {},
        "work": None,
        "floor": {"milliseconds": 0.5, "bound": "memory"},
    }
    return {**made, **changes}


def document(*rows, **more):
    card = {"processor": "a processor", "torch": "2.0", "build": {"isa": "avx2"}}
    suite = {"cases": list(rows), "date": "2000-01-01", "commit": "abc"}
    return {"machine": card, "threads": 1, "quick": False, "suites": {"spectral": suite}, **more}


# ---- ratios and tables -------------------------------------------------------------------------


def test_ratios_leave_out_units_and_ours():
    assert tables.rivals(row()) == {"fast": 0.5, "slow": 4.0}
    assert tables.best_rival(row()) == ("fast", 0.5)
    assert tables.best_rival(row(), ["sl"]) == ("slow", 4.0)
    assert tables.best_rival(row(), ["other"]) is None
    assert tables.share_of_floor(row()) == 0.25


def test_units_are_shown_but_a_floor_is_none():
    made = row(references=["unit", "floor: dot"], milliseconds=times(hessreg=2.0, unit=0.5))
    assert tables.in_units(made) == {"unit": 4.0}
    assert "ours in `unit`" in tables.group_table([made])
    assert "  ours takes 4.00 x unit" in tables.row_lines(made)


def test_a_row_where_a_rival_wins_is_shown_everywhere():
    results = document(row())
    assert "| 4.00 | **0.50** | 4.00 | missing |" in tables.group_table([row()])
    assert any("fast" in line and "(wins)" in line for line in summary.lines(results))
    assert any("0.50 x ours" in line for line in tables.row_lines(row()))


def test_who_is_not_installed_and_what_failed_is_named():
    failed = {"group": "lists", "case": "two", "failed": "ArithmeticError: off by 1"}
    text = tables.group_table([row(), failed])
    assert "`keops`" in text
    assert "| two | failed: ArithmeticError: off by 1 |" in text
    assert any("keops" in line and "not installed" in line for line in tables.row_lines(row()))
    assert any("not installed: keops" in line for line in summary.lines(document(row())))


def test_every_line_of_a_table_has_as_many_cells():
    rows = [row(), row(case="two", errors={"hessreg": 1e-6, "fast": 1e-3}), row(floor=None)]
    rows.append(
        row(ours=[], milliseconds=times(fast=1.0), **{"left out": {"hessreg": "slow: 9 s"}})
    )
    lines = tables.group_table(rows).strip().splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_a_rival_that_errs_more_is_shown_with_its_error():
    errors = {"hessreg": 1e-10, "fast": 2e-5, "slow": 5e-10}
    assert tables.less_exact(row(errors=errors), "fast") == ", error 2e-05, ours 1e-10"
    assert tables.less_exact(row(errors=errors), "slow") == ""
    assert tables.less_exact(row(), "fast") == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0312, "0.031"),
        (0.5, "0.50"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1234"),
        (0, "0.00"),
    ],
)
def test_three_digits(number, text):
    assert tables.digits(number) == text


def test_the_picture_has_a_bar_for_each_row(tmp_path):
    summary.draw(document(row(), row(case="two")), tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


# ---- floors ------------------------------------------------------------------------------------


def test_the_floor_is_the_longer_of_traffic_and_arithmetic():
    def floor(work, **how):
        found = floor_of(work, LIMITS, **{"cold": False, "device": "cpu", **how})
        return found["bound"], pytest.approx(found["milliseconds"])

    assert floor(Work(bytes=4000)) == ("memory", 1e-3)  # at the rate of 1000 bytes
    assert floor(Work(bytes=4000), cold=True) == ("memory", 4e-3)  # at that of the largest
    assert floor(Work(bytes=100)) == ("memory", 2.5e-5)  # no faster than the smallest size
    assert floor(Work(bytes=8, flops=1e7, exps=1e5)) == ("multiply-adds", 1.1)
    assert floor(Work(bytes=8, flops=1e6, exps=1e6)) == ("exponentials", 1.1)
    assert floor(Work(bytes=8, flops=1e6, exps=1e6), device="cuda") == ("exponentials", 1.0)
    assert floor_of(Work(bytes=8), {}, cold=False, device="cpu") is None


def test_limits_are_printed_or_said_to_be_missing():
    lines = summary.lines(document(row(), limits=LIMITS))
    assert "  float32 flops        10.0 G/s" in lines
    assert "  read 95 MB           1.0 GB/s" in lines
    assert "  not measured" in summary.lines(document(row(), limits={}))


def test_products_are_counted_also_in_second_derivatives():
    x, w = torch.randn(3, 5), torch.randn(7, 5, requires_grad=True)
    assert limits.counted_work(lambda: x @ w.T, [w]) == Work(bytes=2 * 4 * 35, flops=2 * 3 * 5 * 7)

    def twice():
        (g,) = torch.autograd.grad((x @ w.T).tanh().sum(), w, create_graph=True)
        torch.autograd.grad(g.sum(), w)

    assert limits.counted_work(twice, [w]).flops >= 3 * 2 * 3 * 5 * 7


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_loops_for_a_gpu_compile(tmp_path):
    flags = ["-O3", "-arch=sm_90", "-shared", "-Xcompiler", "-fPIC"]
    out = tmp_path / "limits.so"
    subprocess.run(["nvcc", *flags, str(HERE / "limits.cu"), "-o", str(out)], check=True)
    assert out.exists()


# ---- timing ------------------------------------------------------------------------------------


def test_contestants_take_turns_and_slow_ones_fewer(monkeypatch):
    calls: list[str] = []
    lasts = {"a": 1.0, "b": 100.0}

    def once(run, device):
        run()
        return lasts[calls[-1]]

    monkeypatch.setattr(harness, "time_once", once)
    runs = {name: lambda name=name: calls.append(name) for name in lasts}
    found = harness.measure(runs, rounds=10, device="cpu", cold=False, seconds=0.5)
    assert calls[4:8] == ["a", "b", "a", "a"]  # after two warm-up calls of each
    assert (calls.count("a"), calls.count("b")) == (12, 7)
    assert found["b"]["median"] == 100.0


def test_small_calls_are_replayed_as_graphs_on_a_gpu(monkeypatch):
    def captured(run):
        if run() == "waits":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return lambda: None

    monkeypatch.setattr(harness, "_captured", captured)
    monkeypatch.setattr(harness, "time_once", lambda run, device: 0.25)
    found = {name: {"median": t} for name, t in (("small", 0.5), ("waits", 0.5), ("large", 5.0))}
    harness._replay({name: lambda name=name: name for name in found}, found, 3, "cuda")
    assert found["small"]["graph"] == 0.25
    assert found["waits"]["graph"] == "cannot: operation not permitted when stream is capturing"
    assert "graph" not in found["large"]
    shown = tables.row_lines(
        row(milliseconds=times(hessreg=1.0) | {"unit": {**times(unit=1.0)["unit"], "graph": 0.25}})
    )
    assert any("as a graph 0.25" in line for line in shown)


class Tiny(harness.Suite):
    name = "tiny"

    def cases(self):
        return ["good", "bad", "also good"]

    def contest(self, case):
        if case == "bad":
            raise ArithmeticError("off by 1")
        runs = {"hessreg": lambda: None, "rival": lambda: None}
        return harness.Contest("group", case, self.admitted(runs, ["hessreg"]), ["hessreg"])


def run_tiny(monkeypatch, path, *more):
    monkeypatch.setattr(harness, "keep_memory", lambda: None)
    monkeypatch.setattr(harness, "measured_limits", lambda *args: {})
    monkeypatch.setattr("sys.argv", ["tiny", "--quick", "--device=cpu", f"--json={path}", *more])
    with pytest.raises(SystemExit) as end:
        harness.run_suite(Tiny)
    return end.value.code


def test_a_case_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    path = tmp_path / "made" / "tiny.json"
    assert run_tiny(monkeypatch, path) == 1
    rows = json.loads(path.read_text())["suites"]["tiny"]["cases"]
    assert [row["case"] for row in rows] == ["good", "bad", "also good"]
    assert rows[1]["failed"] == "ArithmeticError: off by 1"
    assert set(rows[2]["milliseconds"]) == {"hessreg", "rival"}
    assert "failed: ArithmeticError" in capsys.readouterr().out
    assert run_tiny(monkeypatch, path, "--case=also", "--only-ours") == 0
    (row,) = json.loads(path.read_text())["suites"]["tiny"]["cases"]
    assert set(row["milliseconds"]) == {"hessreg"}


def test_a_file_of_another_machine_is_not_touched(tmp_path, monkeypatch):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(document(row())))
    before = path.read_bytes()
    assert "name another file" in run_tiny(monkeypatch, path)
    assert path.read_bytes() == before


def test_suites_of_a_file_that_are_not_measured_again_stay(tmp_path):
    path = tmp_path / "results.json"
    head = {"machine": {"processor": "a"}, "threads": 1, "quick": False}
    for suites in ({"a": 1, "b": 1}, {"b": 2}):
        harness.save(path, {**head, "suites": suites})
    assert json.loads(path.read_text())["suites"] == {"a": 1, "b": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_files_have_six_digits_and_a_line_for_each_contestant(tmp_path):
    times = {"ours": {"median": 1.23456789, "low": 1e-9}, "bmm": {"median": 123456789.0}}
    suites = {"spectral": {"cases": [{"milliseconds": times, "case": "{a} [b]"}]}}
    harness.save(tmp_path / "results.json", {"suites": suites})
    text = (tmp_path / "results.json").read_text()
    assert '"ours": { "median": 1.23457, "low": 1e-09 },\n' in text
    (row,) = json.loads(text)["suites"]["spectral"]["cases"]
    assert row["milliseconds"]["bmm"] == {"median": 123457000.0}
    assert row["case"] == "{a} [b]"


# ---- what was asked ----------------------------------------------------------------------------


def target(**changes):
    made = {"what": "t", "suite": "spectral", "asked": 3.0, "measure": targets.than("slow")}
    return targets.Target(**{**made, "group": "lists", "case": "one", **changes})


def test_targets_are_met_or_missed_by_what_the_file_says():
    suites = document(row())["suites"]
    assert target().measured(suites) == 4.0
    assert target().is_met(4.0)
    assert not target().is_met(2.9)
    assert target(at_most=True).is_met(2.9)
    assert target(case="two").measured(suites) is None
    assert target(suite="hvp").measured(suites) is None
    failed = document({"group": "lists", "case": "one", "failed": "x"})["suites"]
    assert target().measured(failed) is None


def test_a_missed_target_says_why():
    text = report.asked(
        document(row())["suites"],
        [target(asked=9.0, why=lambda row: "because"), target(asked=9.0, case="two"), target()],
        threads=1,
    )
    assert "| at least 9 x | 4.00 x | **missed**: because |" in text
    assert "| at least 9 x | not measured |" in text
    assert "| at least 3 x | 4.00 x | met |" in text


def test_a_rival_is_compared_with_ours_that_errs_no_more():
    errors = {"hessreg": 1e-6, "hessreg rough": 1e-3, "fast": 1e-4, "slow": 1e-2}
    ways = row(
        ours=["hessreg", "hessreg rough"],
        errors=errors,
        milliseconds=times(**{"hessreg": 2.0, "hessreg rough": 1.0, "fast": 3.0, "slow": 8.0}),
    )
    assert targets.no_less_exact("fast")({}, ways) == 1.5
    assert targets.no_less_exact("slow")({}, ways) == 8.0


def test_every_target_has_its_row_in_the_committed_file():
    one_thread = [results for results in report.load() if results["threads"] == 1]
    assert one_thread
    missing = [t.what for t in targets.CPU if t.measured(one_thread[0]["suites"]) is None]
    assert missing == []


def test_without_a_gpu_its_rows_say_so(monkeypatch):
    measured = [results for results in report.load() if "gpu" not in results["machine"]]
    monkeypatch.setattr(report, "load", lambda: measured)
    text = report.page().split("## On a GPU")[1]
    assert text.count("not yet measured") == len(targets.GPU)


def test_the_readme_has_the_table_that_the_files_say():
    readme = report.README.read_text()
    assert "the fastest rival takes" in readme
    assert report.with_table(readme) == readme
    assert report.with_table(readme.replace(report.readme_table(), "\nold\n")) == readme


# ---- two commits, and instructions -------------------------------------------------------------


def test_commits_are_compared_by_neighbouring_pairs():
    drifting = [1.0, 2.0, 4.0, 8.0, 2.0]
    ratio = compare.Ratio.of(drifting, [1.5 * t for t in drifting])
    assert ratio == (1.5, 1.5, 1.5, 5)
    assert ratio.verdict == "slower"
    assert compare.Ratio.of(drifting, [0.5 * t for t in drifting]).verdict == "faster"
    assert compare.Ratio.of([1.0, 1.0, 1.0], [0.5, 1.0, 2.0]) == (1.0, 0.5, 2.0, 3)
    assert compare.Ratio.of([1.0] * 5, [0.9, 2.0, 2.0, 2.0, 2.0]).verdict == ""
    assert compare.Ratio.of([1.0] * 4, [2.0] * 4).verdict == ""  # too few to say


def test_rows_that_one_commit_cannot_run_are_left_out():
    base, head = [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}], [{"a": 2.0}, {"a": 2.0, "b": 3.0}]
    assert compare.ratios(base, head) == {"a": (2.0, 2.0, 2.0, 2)}


def test_times_have_a_row_for_each_of_our_ways():
    ways = row(ours=["hessreg", "slow"])
    failed = {"group": "lists", "case": "two", "failed": "x"}
    assert compare.times_of([ways, failed]) == {"lists: one": 2.0, "lists: one (slow)": 8.0}


ANNOTATED = """
Ir
--------------------------------------------------------------------------------
7,530,000 (100.0%)  PROGRAM TOTALS
7,300,000 (96.95%)  ???:(below main) [/lib/libc.so.6]
  209,049 ( 2.78%)  /src/instructions.cpp:projection_gram [/tmp/kernels]
    7,176 ( 0.10%)  ???:hvp_forward [/tmp/kernels]
    1,000 ( 0.01%)  /src/a.cpp:hvp_forward_inner [/tmp/kernels]
"""


def test_counts_are_read_and_held_against_bounds():
    counts = instructions.parse(ANNOTATED, ["projection_gram", "hvp_forward"])
    assert counts == {"projection_gram": 209_049, "hvp_forward": 7_176}
    bounds = {"projection_gram": 209_048, "hvp_forward": 7_176}
    assert instructions.exceeded(counts, bounds) == ["projection_gram"]
    assert instructions.exceeded(counts, {"projection_gram": 300_000}) == ["hvp_forward"]
    with pytest.raises(SystemExit, match="has not seen absent"):
        instructions.parse(ANNOTATED, ["absent"])


def test_every_counted_kernel_has_a_bound():
    assert set(json.loads(instructions.BOUNDS.read_text())["at most"]) == set(instructions.names())


def test_without_valgrind_the_check_says_so(monkeypatch, capsys):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    monkeypatch.setattr(instructions.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("sys.argv", ["instructions"])
    assert instructions.main() == 0
    assert capsys.readouterr().out == (
        "instruction counts are skipped: valgrind is not installed\n"
    )


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_measures_prints_and_draws(tmp_path, capfd):
    path = tmp_path / "out.json"
    assert main(["bench", "--family=hvp", "--quick", "--device=cpu", f"--json={path}"]) == 0
    results = json.loads(path.read_text())
    assert results["quick"]
    rows = results["suites"]["hvp"]["cases"]
    assert {"hessreg", "torch.matmul"} <= set(rows[-1]["milliseconds"])
    assert not results["limits"] or all(tables.share_of_floor(row) > 0 for row in rows)
    assert path.with_suffix(".png").exists()
    out = capfd.readouterr().out
    assert "symmetric_matmul" in out
    assert f"written: {path}" in out


def test_a_suite_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    ran = []

    def python(root, arguments, seconds):
        ran.append(arguments[1])
        return int(arguments[1].endswith("spectral"))

    monkeypatch.setattr(bench, "_python", python)
    command = ["bench", "--family=hvp,spectral,gaussian", f"--json={tmp_path / 'out.json'}"]
    assert main(command) == 1
    assert ran == [f"benchmarks.bench_{name}" for name in ("hvp", "spectral", "gaussian")]
    assert capsys.readouterr().err == (
        "hessreg: not everything was measured: spectral (exit code 1)\n"
    )


def test_a_suite_that_takes_too_long_is_stopped(tmp_path, monkeypatch, capsys):
    def python(root, arguments, seconds):
        raise subprocess.TimeoutExpired("python", seconds)

    monkeypatch.setattr(bench, "_python", python)
    assert main(["bench", "--family=hvp", f"--json={tmp_path / 'out.json'}"]) == 1
    assert "not everything was measured: hvp (no time left)" in capsys.readouterr().err


def test_outside_of_a_checkout_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.hessreg, "__file__", str(tmp_path / "hessreg" / "__init__.py"))
    assert main(["bench", "--quick"]) == 2
    message = f"hessreg: bench needs a checkout of the source: no benchmarks folder in {tmp_path}\n"
    assert capsys.readouterr().err == message


def test_families_are_the_suites_that_there_are():
    suites = {path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py")}
    assert suites == set(bench.FAMILIES)


@pytest.mark.parametrize("case", bench_training.CASES, ids=str)
def test_hand_written_loops_train_as_the_trainer_does(case):
    bench_training.check_same(case, "cpu")
