# Bulkhead. The two commands that matter: `make serve` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := 2.13.0

.DEFAULT_GOAL := help
.PHONY: help serve test test-all check bench format models native native-asan native-aarch64 kernels kernels-write gpu setup setup-dev clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: setup ## Set up everything on a fresh machine and serve HTTPS on 127.0.0.1:8443
	@exec $(BIN)/bulkhead serve

test: setup-dev ## Run the tests that a contributor runs (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not deep" -n 2 --dist loadfile --no-loadscope-reorder

test-all: setup-dev ## Run everything, with deep property tests
	BULKHEAD_TEST_PROFILE=deep $(BIN)/python -m pytest --timeout 1800
	BULKHEAD_TEST_DATABASE=postgresql $(BIN)/python -m pytest tests/gateway -m "not deep"

check: setup-dev ## Lint, formatting, strict types, import walls, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_house.py

bench: setup ## Measure the running server: make bench KEY=bk-... (see bulkhead bench --help)
	@$(BIN)/bulkhead bench gateway --key "$(KEY)"

format: setup-dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

models: setup-dev ## Try every architecture of transformers and write docs/models.md and the list of what is served
	$(BIN)/python -m engine.models.conformance --write
	$(BIN)/ruff format --quiet engine/models/served.py

kernels: setup-dev ## Compile the GPU kernels for four architectures, without a GPU, and hold them to docs/kernels.md
	@$(BIN)/python -m kernels.gpu.gate

kernels-write: setup-dev ## Compile them and write docs/kernels.md's table again
	@$(BIN)/python -m kernels.gpu.gate --write

gpu: setup-dev ## Where there is a GPU: run the GPU kernels' tests, and the engine's on them, compiled instead of interpreted
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/kernels/gpu tests/engine/test_gpu_runner.py tests/engine/test_decode_graphs.py tests/engine/test_numbers.py tests/engine/test_fp8_cache.py tests/engine/test_padding.py

native: setup ## Build the CPU kernels again, with the C++ compiler's messages
	$(BIN)/python -m pip install --quiet "setuptools>=75"
	$(BIN)/python setup.py build_ext --inplace --force

native-asan: setup-dev ## Run the kernels' tests under AddressSanitizer and UBSan (in a build of their own)
	$(BIN)/python -m pip install --quiet "setuptools>=75"
	BULKHEAD_NATIVE_SANITIZE=1 $(BIN)/python setup.py build_ext --build-lib build/asan --build-temp build/asan-temp
	NATIVE_LIBRARY=build/asan/kernels/cpu/_native.so ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -q -p no:cacheprovider --timeout 600 -m "not deep" --ignore tests/kernels/gpu tests/kernels

AARCH64 := -std=c++17 -pthread -Wall -Wextra -ffp-contract=off -fno-math-errno
native-aarch64: ## Compile the kernels for 64-bit Arm and try them in an emulator (g++-aarch64-linux-gnu, qemu-user-static)
	mkdir -p build/aarch64
	aarch64-linux-gnu-g++ $(AARCH64) -O3 -DOPS=ops_portable -c kernels/cpu/src/isa.cpp -o build/aarch64/isa.o
	aarch64-linux-gnu-g++ $(AARCH64) -O3 -DBULKHEAD_PORTABLE -c kernels/cpu/src/library.cpp -o build/aarch64/library.o
	aarch64-linux-gnu-g++ $(AARCH64) -O1 -static tests/kernels/compare.cpp build/aarch64/*.o -o build/aarch64/compare
	qemu-aarch64-static build/aarch64/compare

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt setup.sh setup.py $(wildcard kernels/cpu/src/*)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" sh setup.sh

$(VENV)/.installed-dev: $(VENV)/.installed
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" sh setup.sh dev

clean: ## Remove the virtual environment and caches; the data folder stays
	rm -rf $(VENV) build kernels/cpu/_native.so *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
