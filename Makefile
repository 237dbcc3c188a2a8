# Each target does its own set-up in .venv, once. PYTHON=/path/to/python uses that interpreter as it is: no venv, nothing but the package is
# installed into it (it must have torch, and for the tests pytest and hypothesis).
ifeq ($(origin PYTHON), undefined)
PY := .venv/bin/python
DEPENDENCIES := .venv/.dependencies
BUILT := .venv/.built
else
PY := $(PYTHON)
DEPENDENCIES :=
BUILT := build/.built
endif

# Results of benches: a folder per machine.
OUT ?= benches/results/$(shell $(PY) benches/machine.py 2>/dev/null || echo unknown)
BENCH_FLAGS ?=

.PHONY: demo test bench bench-smoke lint format gpu wheel sdist clean

demo: $(BUILT)
	$(PY) -m kdkernels demo $(DEMO_FLAGS)

test: $(BUILT)
	$(PY) -m pytest --durations=15

bench: $(BUILT)
	mkdir -p "$(OUT)"
	$(PY) -m pytest benches -q --benchmark-json="$(OUT)/.bench.json" $(BENCH_FLAGS)
	mv "$(OUT)/.bench.json" "$(OUT)/bench.json"

bench-smoke: $(BUILT)
	KDKERNELS_BENCH_SMOKE=1 $(PY) -m pytest benches -q

# One go on a machine with a GPU: build, every test on it, benches with results as JSON in OUT.
gpu: $(BUILT)
	$(PY) -c "import torch; assert torch.cuda.is_available(), 'make gpu needs a GPU that torch sees'"
	mkdir -p "$(OUT)"
	$(PY) -m pytest --durations=15 -o junit_family=xunit2 --junitxml="$(OUT)/tests.xml"
	$(PY) -m pytest benches -q --benchmark-json="$(OUT)/.bench.json" $(BENCH_FLAGS)
	mv "$(OUT)/.bench.json" "$(OUT)/bench.json"

lint: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' | xargs "$$($(PY) -c 'import clang_format; print(clang_format.get_executable("clang-format"))')" --dry-run --Werror

format: $(BUILT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc -name '*.cpp' -o -name '*.h' | xargs "$$($(PY) -c 'import clang_format; print(clang_format.get_executable("clang-format"))')" -i

wheel: $(BUILT)
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

sdist: $(BUILT)
	$(PY) -m build --sdist --no-isolation

clean:
	rm -rf .venv build dist *.egg-info kdkernels/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks runs

.venv/.dependencies: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q -c constraints.txt torch setuptools ninja pybind11 wheel
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[train,export,dev]'
	touch $@ .venv/.fresh

# The dependencies' rule has built the package too; make had seen by then that it was not built.
$(BUILT): $(DEPENDENCIES) setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*)
	@if [ -e .venv/.fresh ]; then rm .venv/.fresh; else $(PY) -m pip install -q --no-build-isolation --no-deps -e .; fi
	mkdir -p $(dir $@)
	touch $@
