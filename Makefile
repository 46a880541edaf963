# make demo    train, evaluate and show a detector on drawn scenes
# make test    lint, types and tests
# Both set up .venv first. TORCH= installs another build of torch; PYTHON= another interpreter.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,assign nms rotated_iou bn_silu dwconv_bn_silu))

.PHONY: demo test lint test-torch test-triton setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: setup
	$(BIN)/rtmdet-fast demo --out runs/demo

test: lint test-torch test-triton

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-torch: setup
	$(BIN)/python -m pytest tests

# The same parity tests, with every kernel run by Triton's interpreter on the CPU.
test-triton: setup
	TRITON_INTERPRET=1 RTMDET_FAST_KERNELS=triton $(BIN)/python -m pytest $(KERNEL_TESTS)

clean:
	rm -rf $(VENV) runs build dist *.egg-info
