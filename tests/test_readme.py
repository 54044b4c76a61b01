"""What the documents tell a reader to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_run(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
        exec(compile(block, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named
    assert set(named) <= targets


def commands():
    lines = [line for path in DOCUMENTS for line in path.read_text().splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("hessreg ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command, monkeypatch, capsys):
    from hessreg import cli
    from hessreg.commands import COMMANDS, load_command

    # SEED and the like, not LM and its kin
    known = ["0" if word.isupper() and len(word) > 2 else word for word in command]
    for name in COMMANDS:
        monkeypatch.setattr(load_command(name), "run", lambda options: None)
    if "--help" in known:
        with pytest.raises(SystemExit, match="0"):
            cli.main(known)
    else:
        assert cli.main(known) == 0, capsys.readouterr().err


def test_benchmark_page_is_what_the_results_say():
    assert report.PAGE.read_text() == report.page()
