#!/usr/bin/env bash
# Everything that needs a GPU, in one run: builds here against the torch that is installed, runs the
# CUDA tests, the sanitizers and the benchmarks. Nothing is downloaded. Usage: tests/gpu_check.sh
# PYTHON names the interpreter; what comes out goes to OUT (default benchmarks/results).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"

nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader
FORCE_CUDA=1 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
"$PYTHON" -c 'import hessreg, json; print(json.dumps(hessreg.build_info(), indent=2))'

"$PYTHON" -m pytest -q -m cuda tests -p no:xdist
"$PYTHON" -m tests.sanitized_cases --list
for tool in memcheck racecheck synccheck; do
  compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m tests.sanitized_cases
done

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
for name in projection gaussian spectral hvp regularizers; do
  "$PYTHON" -m "benchmarks.bench_$name" --device cuda --json "$OUT/$gpu.json"
done
"$PYTHON" -m benchmarks.report
