"""``hessreg doctor``: it tests every operator, and notices a wrong kernel or derivative."""

from __future__ import annotations

import pytest
import torch

import hessreg
from hessreg.cli import main
from hessreg.ops.spectral import symmetric_eigvalsh_op
from hessreg.self_test import _OPERATORS, self_tests

pytest.importorskip("jsonargparse")


def failures() -> dict[str, str]:
    return {test.operator: test.failure for test in self_tests() if test.failure}


def test_every_operator_is_tested():
    assert _OPERATORS.keys() == set(hessreg.ops.__all__)


def test_operators_pass_on_every_backend(device):
    assert {t.operator: t.failure for t in self_tests(str(device)) if t.failure} == {}


def test_doctor_names_versions_devices_and_operators(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed
    assert "backend: " in printed
    assert "FAILED" not in printed
    for name in hessreg.ops.__all__:
        assert f"ok     cpu {name}: error" in printed


@pytest.mark.skipif(not hessreg._backend.compiled(), reason="there is no kernel to break")
def test_a_wrong_kernel_is_noticed(capsys, monkeypatch):
    eigvalsh = symmetric_eigvalsh_op
    run = eigvalsh._run_kernel
    monkeypatch.setattr(eigvalsh, "_run_kernel", lambda arguments: 1.01 * run(arguments))
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "FAILED cpu symmetric_eigvalsh: error 1.0e-02 in float32" in captured.out
    assert "ok     cpu mmd2" in captured.out
    assert captured.err.count("\n") == 1
    assert "self-tests fail: " in captured.err
    assert "symmetric_eigvalsh on cpu" in captured.err


@pytest.mark.skipif(not hessreg._backend.compiled(), reason="there is no kernel to break")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda found: [found[0] * 1.1, *found[1:]], "more than 0.001 allowed"),
        (lambda found: [found[0] * torch.nan, *found[1:]], "more than 0.001 allowed"),
        (lambda found: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_derivative_is_noticed(monkeypatch, broken, message):
    assert failures() == {}
    backward = symmetric_eigvalsh_op._backward
    monkeypatch.setattr(
        symmetric_eigvalsh_op, "_backward", lambda *args: broken(list(backward(*args)))
    )
    assert message in failures()["symmetric_eigvalsh"]
