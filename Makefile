# make demo    train a GAN on handwritten digits, with and without regularisation, and compare
# make style   paint one of scikit-learn's photographs in the style of the other
# make test    every test, on every backend this machine has
# make bench   everything against its rivals and the limits of the machine
# make lint | instruction-check | gpu-check | package-check | clean
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
SECONDS_EACH ?= 40
SOURCES := $(shell find csrc -type f)

.DEFAULT_GOAL := test
.PHONY: demo style test lint format bench instruction-check gpu-check package-check emulator-check clean

.venv/dependencies: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools wheel cmake ninja numpy
	touch $@

.venv/installed: .venv/dependencies setup.py CMakeLists.txt $(SOURCES)
	HESSREG_WERROR=1 $(BIN)/python -m pip install --quiet -c constraints.txt \
	  --no-build-isolation -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/hessreg compare digits --methods none,r1,hsn1r --seconds $(SECONDS_EACH) --jobs $(JOBS) \
	  --out runs/demo-$(shell date +%Y%m%d-%H%M%S)

style: .venv/installed
	mkdir -p runs
	$(BIN)/hessreg style sample:china sample:flower -o runs/style.png

test: .venv/installed
	$(BIN)/python -m pytest -n $(JOBS)

# The emulated kernels once more with every memory access checked.
emulator-check: .venv/installed
	$(BIN)/python -m pytest -n $(JOBS) --emu-check tests -k 'cuda_emulated and not every_check'

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	find benchmarks csrc tests -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format --dry-run --Werror

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	find benchmarks csrc tests -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format -i

# At most 20 minutes, rivals included; FAMILY=... measures some of it anew, into the same file.
RESULTS ?= runs/bench.json
FAMILY ?= all
bench: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[bench]'
	$(BIN)/hessreg bench --family $(FAMILY) --json $(RESULTS)

# Instructions of the CPU kernels against their bounds; skipped where valgrind is not installed.
instruction-check: .venv/installed
	$(BIN)/python -m benchmarks.instructions

# On a machine with a GPU, its torch and toolkit, and no network: nothing is installed.
gpu-check:
	tests/gpu_check.sh

# An sdist and a wheel, each from a clean environment, with and without build isolation.
package-check:
	tests/package_check.sh

clean:
	rm -rf build dist .venv *.egg-info hessreg/*.so
