# Everything here works from a fresh clone: python3 (>= 3.11), make and a network.
PYTHON ?= python3
SANITIZER ?= compute-sanitizer
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
FFI_SOURCES := $(shell find ffi -name '*.txt' -o -name '*.h' -o -name '*.cc' -o -name '*.cu*')

.PHONY: demo test lint eval kernels sanitize clean

demo: $(INSTALLED)  ## continue a prompt with the bundled mini model
	$(BIN)/dsv4 generate < /dev/null

test: lint  ## lint, types and tests on the CPU
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile

eval: $(INSTALLED)  ## the mini model's table of examples/mini/README.md, on the CPU
	JAX_PLATFORMS=cpu $(BIN)/python examples/mini/evaluate.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: $(INSTALLED)  ## compile both libraries to build/ffi, no GPU needed; report the kernels
	command -v nvcc > /dev/null || $(PIP) -e '.[cuda-build]'
	$(PIP) cmake ninja
	PATH="$$PWD/$(BIN):$$PATH" cmake -S ffi -B build/ffi -G Ninja -DPython_EXECUTABLE=$(BIN)/python
	PATH="$$PWD/$(BIN):$$PATH" cmake --build build/ffi
	$(BIN)/python ffi/kernel_resources.py build/ffi/kernels

sanitize:  ## every kernel under compute-sanitizer, on a GPU; PYTHON has jax for CUDA
	cmake -S ffi -B build/sanitizer -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	NVCC_APPEND_FLAGS="-lineinfo -DDSV4_LANES_ARRIVE" cmake --build build/sanitizer --parallel
	DSV4_FFI_DIR=build/sanitizer PYTHONPATH=.:ffi $(PYTHON) -m tests.sanitizer $(SANITIZER)

# Without the CUDA library, which takes minutes: that is `make kernels`.
$(INSTALLED): pyproject.toml constraints.txt $(FFI_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[test]' -C cmake.define.DSV4_CUDA=OFF
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
