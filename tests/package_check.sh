#!/usr/bin/env bash
# Builds an sdist and a wheel and installs each into a clean environment: the sdist with build
# isolation, the wheel as it is; then runs the operator tests against what was installed.
# TORCH=2.15.0 tests the wheel on another release of torch than it was built with.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$PYTHON" -m venv "$work/build"
"$work/build/bin/pip" install --quiet -c constraints.txt build setuptools wheel cmake ninja numpy torch
"$work/build/bin/python" -m build --no-isolation --outdir "$work/dist" .
ls -l "$work/dist"

check() { # check NAME TORCH PACKAGE: installs it in an environment of its own and tests it there
  echo "== $1"
  "$PYTHON" -m venv "$work/$1"
  "$work/$1/bin/pip" install --quiet "torch==$2" numpy scipy pytest pytest-timeout pytest-xdist pybind11
  "$work/$1/bin/pip" install --quiet "$3"
  mkdir "$work/$1/run"
  cp -r tests "$work/$1/run"
  (cd "$work/$1/run" && "../bin/python" -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider \
    -n 2 -m 'not slow' -k 'not emulated and not reference and not every_size' \
    tests/test_gaussian.py tests/test_hvp.py tests/test_projection.py tests/test_spectral.py)
}

check wheel "${TORCH:-2.13.0}" "$(ls "$work"/dist/*.whl)"
check sdist 2.13.0 "$(ls "$work"/dist/*.tar.gz)"
