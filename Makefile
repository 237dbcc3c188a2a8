# The first target that runs creates .venv and installs the dependencies and the package into it.
# PYTHON=/path/to/python uses that interpreter instead. Only the package is then installed; torch
# and, for the tests, pytest and hypothesis must be installed already.
TEST_FLAGS ?=
# Run two tests in parallel if pytest-xdist is installed.
WORKERS = $(shell $(PY) -c "import xdist; print('-n 2 --dist=worksteal')" 2>/dev/null)
ifeq ($(origin PYTHON), undefined)
PY := .venv/bin/python
DEPENDENCIES := .venv/.dependencies
BUILT := .venv/.built
else
PY := $(PYTHON)
DEPENDENCIES :=
BUILT := build/.built
endif

# Also build the extension modules that only tests import. Wheels are built without them
# (KDKERNELS_TESTING=0 below).
export KDKERNELS_TESTING ?= 1

# Only the kernels for the best instruction set of this CPU. Wheels, and the build of `make test-all`,
# contain those for all instruction sets.
ALL_ISAS := $(KDKERNELS_ISAS)
FLAGS_OF_CPU := $(shell grep -m1 '^flags' /proc/cpuinfo 2>/dev/null)
BEST_ISA := $(if $(filter avx512vl,$(FLAGS_OF_CPU)),avx512,$(if $(filter avx2,$(FLAGS_OF_CPU)),avx2,baseline))
export KDKERNELS_ISAS ?= $(BEST_ISA)

# Folder for the results of the benches, one for each class of machine.
OUT ?= benches/results/$(shell $(PY) benches/machine.py 2>/dev/null || echo unknown)
BENCH_FLAGS ?=

.PHONY: demo docs test test-all test-torch test-peers cuda-check bench bench-quick bench-smoke lint format gpu wheel sdist clean

demo: $(BUILT)
	$(PY) -m kdkernels demo $(DEMO_FLAGS)

# Without the tests in tests/slow_tests.txt.
test: $(BUILT)
	$(PY) -m pytest --durations=15 -m "not slow" $(WORKERS) $(TEST_FLAGS)

# All tests, with the kernels for all instruction sets.
test-all: $(BUILT)
	KDKERNELS_ISAS=$(ALL_ISAS) $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	$(PY) -m pytest --durations=15 $(WORKERS) $(TEST_FLAGS)

# Run the tests with another release of torch and its Triton, in a separate virtual environment:
# make test-torch VERSION=2.10.0. The package is built in a copy of the working tree, because the
# extension modules in the tree are built for another torch. It is built without CUDA, and only for
# the best instruction set of this CPU. The interpreter of Triton 3.6, which torch 2.10 and 2.11
# use, needs NumPy < 2.4.
TORCH_ENVIRONMENT = .venv-torch-$(VERSION)

test-torch:
	$(if $(VERSION),,$(error VERSION is missing; give the release of torch: make test-torch VERSION=2.10.0))
	python3 -m venv $(TORCH_ENVIRONMENT)
	$(TORCH_ENVIRONMENT)/bin/python -m pip install -q torch==$(VERSION) 'setuptools>=77' ninja pybind11 wheel
	rm -rf $(TORCH_ENVIRONMENT)/source
	mkdir $(TORCH_ENVIRONMENT)/source
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $(TORCH_ENVIRONMENT)/source
	cd $(TORCH_ENVIRONMENT)/source && KDKERNELS_CUDA=0 KDKERNELS_ISAS=$(BEST_ISA) ../bin/python -m pip install -q --no-build-isolation -e '.[train,export,dev]' torch==$(VERSION) 'numpy<2.4'
	cd $(TORCH_ENVIRONMENT)/source && ../bin/python -m pytest --durations=15 -n 2 --dist=worksteal $(TEST_FLAGS)

# Build the CUDA kernels without a GPU, against a CUDA build of torch in a separate virtual
# environment, and check the compiled library: tests/check_cuda_build.py lists the checks. This needs
# nvcc of the same major CUDA version, about 7 GB of disk and ten minutes, so CI does not run it.
# CUDA_TORCH is the release of torch; on Linux x86-64 the package index has CUDA builds of torch.
CUDA_TORCH ?= 2.14.1
CUDA_ENVIRONMENT = .venv-cuda

cuda-check:
	python3 -m venv $(CUDA_ENVIRONMENT)
	$(CUDA_ENVIRONMENT)/bin/python -m pip install -q torch==$(CUDA_TORCH) numpy 'setuptools>=77' ninja pybind11 wheel
	rm -rf $(CUDA_ENVIRONMENT)/source
	mkdir $(CUDA_ENVIRONMENT)/source
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $(CUDA_ENVIRONMENT)/source
	cd $(CUDA_ENVIRONMENT)/source && KDKERNELS_CUDA=1 KDKERNELS_TESTING=0 KDKERNELS_ISAS=$(BEST_ISA) ../bin/python -m pip install -q --no-build-isolation --no-deps -e .
	cd $(CUDA_ENVIRONMENT)/source && ../bin/python tests/check_cuda_build.py

# Compare kdkernels.compat with the packages whose losses it has, in a separate virtual environment.
# torchdistill is installed without its dependencies, because its losses need only torch.
test-peers: $(BUILT)
	python3 -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q -c constraints.txt torch numpy triton pytest -r tests/peers/requirements.txt
	.venv-peers/bin/python -m pip install -q --no-deps -r tests/peers/requirements-no-deps.txt
	cp .venv/lib/python3*/site-packages/__editable__* .venv-peers/lib/python3*/site-packages/
	.venv-peers/bin/python -m pytest --noconftest -q tests/peers/check_peers.py $(TEST_FLAGS)

bench: $(BUILT)
	$(PY) -m kdkernels bench --report --out "$(OUT)" $(BENCH_FLAGS)
	KDKERNELS_BENCH_DEVICE=cpu $(PY) -m benches.cpu_profile --out "$(OUT)/cpu_profile.json"

# Run the main rows and compare their ratios with the committed results of this class of machine.
# The comparison never fails the target.
bench-quick: $(BUILT)
	$(PY) -m kdkernels bench --quick --out runs/bench_quick $(BENCH_FLAGS)
	$(PY) -m kdkernels bench --compare runs/bench_quick/bench.json

bench-smoke: $(BUILT)
	rm -rf runs/bench_smoke
	$(PY) -m kdkernels bench --smoke --report --out runs/bench_smoke $(BENCH_FLAGS)

# Everything that is run on a machine with a GPU: build, all tests, compute-sanitizer on the CUDA
# kernels, benches with results as JSON in OUT, and the memory bandwidth of the backward if ncu is
# installed and has access to the counters. At the end, the measured times, also those of each kernel,
# are printed beside those that benches/gpu_model.py predicts. DEVICE=cpu runs the parts that need no
# GPU.
DEVICE ?= cuda
SANITIZER := $(shell command -v compute-sanitizer 2>/dev/null)
NCU := $(shell command -v ncu 2>/dev/null)
METRICS := dram__bytes.sum.per_second,dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum

gpu: $(BUILT)
	$(PY) -c "import torch; assert '$(DEVICE)' == 'cpu' or torch.cuda.is_available(), 'make gpu needs a GPU, and torch finds none'"
	$(PY) -c "import kdkernels; kdkernels.show_config(); from kdkernels.config import HAS_CUDA_KERNELS as built; assert '$(DEVICE)' == 'cpu' or built, 'the CUDA kernels are not built; see the output of the build'"
	mkdir -p "$(OUT)"
	$(PY) -m pytest --durations=15 -o junit_family=xunit2 --junitxml="$(OUT)/tests.xml" $(TEST_FLAGS)
	$(PY) tests/exercise_cuda.py --device $(DEVICE)
	$(if $(SANITIZER),$(SANITIZER) --tool memcheck --error-exitcode 1 $(PY) tests/exercise_cuda.py --device $(DEVICE),@echo "compute-sanitizer is not installed: memcheck was not run")
	$(if $(SANITIZER),$(SANITIZER) --tool racecheck --error-exitcode 1 $(PY) tests/exercise_cuda.py --device $(DEVICE),@echo "compute-sanitizer is not installed: racecheck was not run")
	$(PY) -m kdkernels bench --device $(DEVICE) --report --out "$(OUT)" $(BENCH_FLAGS)
	$(if $(NCU),-$(NCU) --csv --kernel-name regex:update_kernel --metrics $(METRICS) $(PY) tests/exercise_cuda.py --device $(DEVICE) --large > "$(OUT)/ncu.csv",@echo "ncu is not installed: the bandwidth of the backward was not measured")
	$(PY) -m benches.gpu_model --measured "$(OUT)/bench.json"
	$(if $(filter cuda,$(DEVICE)),$(PY) -m benches.gpu_profile --out "$(OUT)/profile.json",@echo "DEVICE=$(DEVICE): the kernels were not measured one by one")

lint: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tests/cuda_sources.py syntax
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs "$$($(PY) -c 'import clang_format; print(clang_format.get_executable("clang-format"))')" --dry-run --Werror

format: $(BUILT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs "$$($(PY) -c 'import clang_format; print(clang_format.get_executable("clang-format"))')" -i

# The documentation site, in site/. It needs neither torch nor a build of the package, so its packages
# are in a separate virtual environment. A broken link is an error.
DOCS_REQUIREMENTS = from pip._vendor import tomli; \
  print(*tomli.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")

docs: .venv-docs/.dependencies
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --clean -q
	@echo "site/index.html"

.venv-docs/.dependencies: pyproject.toml constraints.txt
	python3 -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q --upgrade pip
	.venv-docs/bin/python -c '$(DOCS_REQUIREMENTS)' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install -q -c constraints.txt -r .venv-docs/requirements.txt
	touch $@

wheel: $(BUILT)
	rm -rf build/lib*
	KDKERNELS_TESTING=0 KDKERNELS_ISAS=$(ALL_ISAS) $(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

sdist: $(BUILT)
	$(PY) -m build --sdist --no-isolation

clean:
	rm -rf .venv .venv-torch-* .venv-cuda .venv-peers .venv-docs site build dist *.egg-info kdkernels/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks runs

# Prints the dependencies. The parser is pip's, because Python 3.10 has none.
PRINT_REQUIREMENTS = from pip._vendor import tomli; \
  project = tomli.load(open("pyproject.toml", "rb"))["project"]; \
  extras = [requirement for extra in ("train", "export", "dev") for requirement in project["optional-dependencies"][extra]]; \
  print(*project["dependencies"], *extras, sep="\n")

# The package is built while pip installs the dependencies that the build does not need.
.venv/.dependencies: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q -c constraints.txt torch numpy 'setuptools>=77' ninja pybind11 wheel
	$(PY) -c '$(PRINT_REQUIREMENTS)' > .venv/requirements.txt
	$(PY) -m pip install -q --no-build-isolation --no-deps -e . & build=$$!; \
	  $(PY) -m pip install -q -c constraints.txt -r .venv/requirements.txt; dependencies=$$?; \
	  wait $$build && exit $$dependencies
	touch $@ .venv/.fresh

# The rule for .venv/.dependencies also builds the package and creates .venv/.fresh; in this case
# the package is not built again.
$(BUILT): $(DEPENDENCIES) setup.py cuda_toolkit.py pyproject.toml $(shell find csrc -type f)
	@if [ -e .venv/.fresh ]; then rm .venv/.fresh; else $(PY) -m pip install -q --no-build-isolation --no-deps -e .; fi
	mkdir -p $(dir $@)
	touch $@
