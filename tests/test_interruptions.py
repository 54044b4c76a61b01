"""Killed, interrupted, out of disk: what was saved is whole, and the run goes on bit for bit."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hessreg.cli import main
from hessreg.gan.checkpoint import load_state, save_state
from hessreg.gan.run import Run
from hessreg.gan.run_folder import RunFolder
from hessreg.regularizers import R1

for package in ("jsonargparse", "matplotlib", "PIL", "rich", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

COMMAND = [sys.executable, "-W", "error", "-m", "hessreg"]
SMALL = ["--width=8", "--latent_dim=4", "--batch_size=8", "--tensorboard=false"]
LONG = ["--steps=320", "--log_every=7", "--save_every=40", "--eval_every=150", "--hsn1r.every=4"]


def start(*args, command=COMMAND, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, args)], **pipes, **options)


def run(*args) -> None:
    process = start(*args)
    _, error = process.communicate()
    assert process.returncode == 0, error


def wait_for_step(folder, step, process) -> None:
    while process.poll() is None:
        rows = RunFolder(folder).read_metrics()
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"ended before step {step}: {process.communicate()}")


def outcome(folder):
    """All that must not depend on interruptions: states, metrics and result but times, pictures."""
    files = RunFolder(folder)
    states = [load_state(file) for file in (files.last_checkpoint(), files.best)]
    rows = [*files.read_metrics(), files.read_result()]
    timeless = [{k: v for k, v in row.items() if k != "cpu_seconds"} for row in [*states, *rows]]
    pictures = [(folder / name).read_bytes() for name in ("samples.png", "best.png")]
    return timeless, pictures, sorted(file.name for file in files.checkpoints.iterdir())


def assert_same(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Kills

STEPS = 600
MOMENTS = 20
_AT_WRITE = """
import os, pathlib, signal, sys
left, replace = int(sys.argv.pop(1)), pathlib.Path.replace
def counted(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*args)
pathlib.Path.replace = counted
from hessreg.cli import main
main()
"""


def assert_killed(process) -> None:
    output = process.communicate()
    assert process.returncode == -signal.SIGKILL, output


def kill_in_a_write(command, number) -> str:
    """Just before the number-th file is renamed: all of it is in the temporary one."""
    process = start(number, *command, command=[sys.executable, "-c", _AT_WRITE])
    assert_killed(process)
    return f"in write {number}"


def kill_after(command, seconds) -> str:
    process = start(*command)
    time.sleep(seconds)
    process.kill()
    assert_killed(process)
    return f"after {seconds:.2f} s"


def kill_at_step(command, folder, step, jitter) -> str:
    process = start(*command)
    wait_for_step(folder, step, process)
    time.sleep(jitter)
    process.kill()
    assert_killed(process)
    return f"{1e3 * jitter:.0f} ms after step {step}"


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_as_if_nothing_had_happened(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = [*SMALL, f"--steps={STEPS}", "--log_every=3", "--save_every=10", "--eval_every=200"]
    methods = ["--regularizer=gaussian+hsn1r+r1", "--gaussian.sigma=learned", "--hsn1r.every=4"]
    train = ["train", "ring", *options, *methods]
    run(*train, f"--out={whole}")
    choice = random.Random(7)
    kinds = ["start"] * 6 + ["write"] * 5 + ["step"] * (MOMENTS - 11)
    choice.shuffle(kinds)
    steps = iter(sorted(choice.sample(range(10, STEPS - 100), kinds.count("step"))))
    for kind in kinds:
        made = (broken / "config.yaml").exists()
        command = ["resume", broken] if made else [*train, f"--out={broken}"]
        if kind == "start":
            moment = kill_after(command, choice.uniform(0.05, 2.5))
        elif kind == "write":
            moment = kill_in_a_write(command, choice.randint(1, 3))
        else:
            moment = kill_at_step(command, broken, next(steps), choice.uniform(0.0, 0.05))
        print(f"killed {moment}: {command[0]}")
    run("resume", broken)
    assert_same(outcome(broken), outcome(whole))
    assert not list(broken.rglob("*.tmp"))


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_killed_before_its_first_checkpoint_can_be_made_again(tmp_path, number):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train = ["train", "ring", "--regularizer=r1", *SMALL, "--steps=4"]
    assert main([*train, f"--out={whole}"]) == 0
    kill_in_a_write([*train, f"--out={broken}"], number)
    assert (broken / "config.yaml").exists() == (number == 2)
    assert main(["resume", str(broken)] if number == 2 else [*train, f"--out={broken}"]) == 0
    assert_same(outcome(broken), outcome(whole))


@pytest.mark.parametrize(
    "task",
    [
        ["digits", "--regularizer=hsn1r+r1"],
        ["digits", "--regularizer=r1", "--orthogonal=previous", "--projection.strength=0.4"],
        ["digits", "--regularizer=none", "--correction=hsc", "--hsc.every=3", "--hsc.network=both"],
    ],
    ids=["regularized", "orthogonal", "corrected"],
)
def test_a_run_resumes_bit_for_bit_whatever_stopped_it(tmp_path, task):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["train", *task[:1], *SMALL, *LONG, *task[1:]]
    assert main([*command, f"--out={whole}"]) == 0

    process = start(*command, f"--out={broken}")
    for number, step in ((signal.SIGTERM, 100), (signal.SIGINT, 200)):
        wait_for_step(broken, step, process)
        process.send_signal(number)
        _, error = process.communicate()
        assert process.returncode == 130
        assert_says_how_to_continue(broken, error)
        process = start("resume", broken)
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert_same(outcome(broken), outcome(whole))


def assert_says_how_to_continue(folder, error) -> None:
    assert error.count("\n") == 1
    assert f"continue with: hessreg resume {folder}" in error
    step = int(error.split("stopped at step ")[1].split(";")[0])
    assert RunFolder(folder).last_checkpoint().name == f"step-{step:09d}.safetensors"


# Ctrl-C and SIGTERM before there is anything to save


def wait_for_handlers(process) -> None:
    """Until SIGTERM is no longer deadly, which is what the package does first."""
    caught = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if int(status.split("SigCgt:")[1].split()[0], 16) & caught:
            return
        time.sleep(0.001)
    raise AssertionError(f"ended: {process.communicate()}")


COMMANDS = {
    "train": ["train", "digits", "--steps=1000000"],
    "compare": ["compare", "ring", "--steps=1000000"],
    "dynamics": ["dynamics"],
    "doctor": ["doctor"],
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("name", "seconds"),
    [("train", 0.0), ("train", 0.3), ("train", 1.6), ("compare", 0.8), ("dynamics", 2.0)],
)
def test_an_interrupted_start_is_one_line(tmp_path, name, seconds, number):
    process = start(*COMMANDS[name], f"--out={tmp_path / 'out'}")
    wait_for_handlers(process)
    time.sleep(seconds)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.startswith("hessreg: ")
    assert error.count("\n") == 1
    assert "Traceback" not in out


_SLOW_MODULE = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    pass
print("imported")
"""
_IMPORT = """
import time
from hessreg import _interrupt
_interrupt._PATIENCE = {patience}
with _interrupt.Interrupts():
    try:
        import slow_module
        time.sleep(30)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize(
    ("seconds", "patience", "wanted"),
    [(0.1, 20, "imported\ninterrupted\n"), (30, 0.3, "interrupted\n")],
)
def test_an_import_is_interrupted_only_if_it_takes_long(tmp_path, seconds, patience, wanted):
    (tmp_path / "slow_module.py").write_text(_SLOW_MODULE.format(seconds=seconds))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    process = start(
        _IMPORT.format(patience=patience),
        command=[sys.executable, "-W", "error", "-c"],
        env=environment,
    )
    assert process.communicate(timeout=25) == (wanted, "")


_OPEN_FILE = """
import os, signal
from hessreg._interrupt import Interrupts
with Interrupts():
    open(os.devnull)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        open(os.devnull)
"""


def test_what_an_interruption_leaves_open_is_not_reported():
    process = start(_OPEN_FILE, command=[sys.executable, "-W", "error", "-c"])
    _, error = process.communicate(timeout=25)
    assert error.count("ResourceWarning: unclosed file") == 1  # the first


def test_a_command_of_an_installed_package_is_recognised(monkeypatch):
    from hessreg._interrupt import is_command

    for program, wanted in (
        ("/usr/bin/hessreg", True),
        ("-m", True),
        ("train.py", False),
        ("", False),
        ("C:/hessreg.exe", True),
    ):
        monkeypatch.setattr(sys, "argv", [program])
        assert is_command() == wanted
    monkeypatch.setattr(sys, "argv", [])
    assert not is_command()


# Disks


def can_mount() -> bool:
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(command, capture_output=True).returncode
    )


NEEDS_MOUNT = pytest.mark.skipif(not can_mount(), reason="may not mount a file system")


def on_small_disk(tmp_path, size, *args):
    """Run a command whose folder ``disk`` has so many bytes; return code, error and files."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir(exist_ok=True)
    script = (
        f"mount -t tmpfs -o size={size} none {disk} && {{ "
        '"$@"; code=$?; '
        f"cp -r {disk} {kept}; exit $code; }}"
    )
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", *COMMAND]
    process = start(*args, command=command)
    _, error = process.communicate()
    return process.returncode, error, kept


@NEEDS_MOUNT
def test_a_disk_that_is_too_small_stops_a_run_before_it_starts(tmp_path):
    out = tmp_path / "disk" / "runs" / "new"
    train = ["train", "ring", *SMALL, "--regularizer=r1", "--steps=2", f"--out={out}"]
    code, error, kept = on_small_disk(tmp_path, "3m", *train)
    assert code == 2
    assert error.count("\n") == 1
    assert f"the disk of {out} is full:" in error
    wanted, available = (int(word) for word in error.split() if word.isdigit())
    assert wanted > 4 << 20
    assert 0 < available <= 3 << 20
    assert list(kept.iterdir()) == []


@NEEDS_MOUNT
def test_a_disk_that_fills_during_training_loses_nothing(tmp_path):
    out = tmp_path / "disk" / "run"
    train = ["train", "ring", *SMALL, "--regularizer=r1", "--steps=200000", "--save_every=50"]
    # Everything is logged at each step: the disk fills with rows.
    rows = ["--log_every=1", "--eval_every=100000", "--width=4", f"--out={out}"]
    script = f'"$@" & pid=$!; while [ ! -e {out}/metrics.jsonl ]; do sleep 0.05; done; '
    script += f"head -c 6300000 /dev/zero 2>/dev/null >{out.parent}/other; wait $pid"
    args = ["sh", "-c", script, "sh", *COMMAND, *train, *rows]
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    mounted = (
        f'mount -t tmpfs -o size=7m none {disk} && "$@"; code=$?; cp -r {disk} {kept}; exit $code'
    )
    command = ["unshare", "-Urm", "sh", "-c", mounted, "sh", *args]
    process = start(command=command)
    _, error = process.communicate()
    assert process.returncode == 1, error
    assert error.count("\n") == 1
    assert "No space left on device" in error
    last = RunFolder(kept / "run").last_checkpoint()
    assert f"the last good checkpoint is {out / 'checkpoints' / last.name}" in error
    load_state(last)
    assert main(["resume", str(kept / "run"), f"--steps={int(last.stem[5:]) + 60}"]) == 0


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_line(tmp_path):
    folder = tmp_path / "run"
    train = ["train", "ring", *SMALL, "--regularizer=r1", "--steps=60", "--save_every=20"]
    # The first checkpoint has no moments of Adam and no queue of samples; the next is too large.
    limit = 100_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(*train, f"--out={folder}", preexec_fn=limited)
    _, error = process.communicate()
    assert process.returncode == 1, error
    assert error.count("\n") == 1
    first = folder / "checkpoints" / "step-000000000.safetensors"
    assert "File too large: " in error
    assert f"the last good checkpoint is {first}; continue with: hessreg resume {folder}" in error
    assert [file.name for file in first.parent.iterdir()] == [first.name]
    run("resume", folder)


@NEEDS_MOUNT
def test_a_folder_that_may_not_be_written_stops_a_run_before_it_starts(tmp_path):
    out = tmp_path / "disk" / "run"
    train = ["train", "ring", *SMALL, "--regularizer=r1", f"--out={out}"]
    code, error, kept = on_small_disk(tmp_path, "64m,ro", *train)
    assert code == 2
    assert error == f"hessreg: cannot write to {out}: Read-only file system\n"
    assert list(kept.iterdir()) == []


# The best checkpoint


def test_an_extended_run_that_was_interrupted_is_not_finished(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    train = ["train", "ring", "--regularizer=none", *SMALL, "--steps=2", f"--out={folder}"]
    assert main(train) == 0
    step = Run._step

    def stopped(self, signals):
        step(self, signals)
        signals.stop = True

    monkeypatch.setattr(Run, "_step", stopped)
    assert main(["resume", str(folder), "--steps=9"]) == 130
    assert not (folder / "result.json").exists()
    monkeypatch.undo()
    assert main(["resume", str(folder)]) == 0
    assert RunFolder(folder).read_result()["steps"] == 9


def test_the_best_evaluation_is_that_of_its_file_after_a_kill(tmp_path):
    folder = tmp_path / "run"
    long = [*SMALL, "--steps=8", "--eval_every=4", "--save_every=4", f"--out={folder}"]
    assert main(["train", "ring", "--regularizer=none", *long]) == 0
    last, best = RunFolder(folder).last_checkpoint(), RunFolder(folder).best
    state = load_state(last)
    save_state(best, state | {"best": {"step": 8, "value": 0.0}})
    last.unlink()  # as if the run had been killed after its evaluation, before this checkpoint
    assert main(["resume", str(folder), "--steps=5"]) == 0
    result = RunFolder(folder).read_result()
    assert result["steps"] == 5
    assert result["best"]["step"] == load_state(best)["best"]["step"] == 8


def test_the_best_checkpoint_stays_and_can_be_used(tmp_path):
    folder = tmp_path / "run"
    train = ["train", "ring", "--regularizer=none", *SMALL, "--steps=120", "--save_every=20"]
    assert main([*train, "--eval_every=10", f"--out={folder}"]) == 0
    files = RunFolder(folder)
    rows = [row for row in files.read_metrics() if "mmd" in row]
    wanted = min(rows, key=lambda row: row["mmd"])
    best = {"step": wanted["step"], "mmd": wanted["mmd"]}
    result = files.read_result()["best"]
    assert result == {**best, "checkpoint": "checkpoints/best.safetensors", "samples": "best.png"}
    state = load_state(folder / result["checkpoint"])
    assert state["trainer"]["steps_done"] == wanted["step"]
    assert state["best"] == {"step": wanted["step"], "value": wanted["mmd"]}
    assert (folder / "best.png").read_bytes().startswith(b"\x89PNG")
    assert files.last_checkpoint().name == "step-000000120.safetensors"
    args = ["--rows=8", "--steps=4", "--probes=1", "--k=1", f"--out={tmp_path / 'spectrum'}"]
    assert main(["spectrum", str(files.best), *args]) == 0


# Errors in the middle of a run

FAILING = """
import torch
from torch import nn

class Judge(nn.Linear):
    def __init__(self, error=None):
        super().__init__(2, 1)
        self.error, self.calls = error, 0
    def forward(self, x):
        self.calls += 1
        if self.error and self.calls > 30:  # three for each step, one for what a run tries first
            raise self.error
        return super().forward(x).squeeze(1)

def value(latent_dim, shape, num_classes, outputs):
    return nn.Linear(latent_dim, 2), Judge(ValueError("bad\\nsamples"))
def key(latent_dim, shape, num_classes, outputs):
    return nn.Linear(latent_dim, 2), Judge(KeyError("unknown"))

class Stuck(torch.optim.SGD):
    def step(self, closure=None):
        self.done = getattr(self, "done", 0) + 1
        if self.done > 9:
            raise TypeError("no step")
        super().step(closure)
def stuck(params, lr): return Stuck(params, lr)
"""
FAILURES = {
    "--architecture=failing:value": "ValueError: bad samples",
    "--architecture=failing:key": "KeyError: 'unknown'",
    "--architecture=failing:value --spectrum_every=9": "TargetError: generator: bad samples",
    "--g.optimizer=failing:stuck": "TypeError: no step",
}


@pytest.fixture
def failing(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "run"


@pytest.mark.parametrize("options", FAILURES)
def test_an_error_in_the_middle_of_a_run_is_one_line(failing, capsys, options):
    train = ["train", "ring", "--regularizer=none", "--steps=20", "--save_every=4", *SMALL]
    assert main([*train, *options.split(), f"--out={failing}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"hessreg: after step 9: {FAILURES[options]}")
    assert error.count("\n") == 1
    last = RunFolder(failing).last_checkpoint()
    assert last.name == "step-000000008.safetensors"
    assert f"the last good checkpoint is {last}; continue with: hessreg resume {failing}" in error
    assert load_state(last)["trainer"]["steps_done"] == 8


def test_a_resumed_run_that_fails_says_so_and_can_be_resumed_once_it_is_mended(
    failing, capsys, monkeypatch
):
    train = ["train", "ring", "--regularizer=r1", "--steps=4", "--save_every=2", *SMALL]
    assert main([*train, f"--out={failing}"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as broken:
        broken.setattr(R1, "penalty", lambda self, slopes: slopes @ slopes)
        assert main(["resume", str(failing), "--steps=6"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hessreg: after step 4: RuntimeError: mat1 and mat2 shapes")
    assert error.count("\n") == 1
    assert main(["resume", str(failing)]) == 0
    assert RunFolder(failing).read_result()["steps"] == 6


@pytest.mark.parametrize(("wish", "is_shown"), [("1", True), ("0", False)])
def test_the_traceback_of_a_failure_can_be_seen(failing, capsys, monkeypatch, wish, is_shown):
    monkeypatch.setenv("HESSREG_TRACEBACK", wish)
    train = ["train", "ring", "--regularizer=none", "--steps=20", *SMALL]
    assert main([*train, "--architecture=failing:value", f"--out={failing}"]) == 1
    error = capsys.readouterr().err
    assert ("raise self.error\nValueError: bad\nsamples\n" in error) == is_shown
    assert error.splitlines()[-1].startswith("hessreg: after step 9: ValueError: bad samples;")
