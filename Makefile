# make demo    train, evaluate and show a detector on drawn scenes
# make test    lint, types and tests
# Both set up .venv first. TORCH= installs another build of torch; PYTHON= another interpreter.
# make test-slow   every configuration of the kernels, compiled for four GPUs
# make bench   benches beside the peers that are installed; writes benches/results, benches/README.md and its pictures
# make bench-compare   measures anew and prints what is slower than in the committed results by more than the spread
# make gpu     parity, then benches, within 9 minutes on a CUDA machine with its own Python (torch, triton, numpy)

PYTHON ?= python3
TORCH ?= torch==2.13.0
# A build of torch for CPUs brings no Triton; the bounds on registers in the tests are this one's.
TRITON ?= triton==3.6.0
VENV ?= .venv
BIN := $(VENV)/bin
KERNEL_TESTS := $(patsubst %,tests/test_%.py,assign nms rotated_iou bn_silu dwconv_bn_silu accelerate training_with_kernels)

.PHONY: demo test lint test-torch test-triton test-slow bench bench-compare gpu setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || test "$$(uname -sm)" != "Linux x86_64" \
		|| $(BIN)/python -m pip install --quiet "$(TRITON)"
	$(BIN)/python -m pip install --quiet --editable ".[test,bench]"
	touch $@

demo: setup
	$(BIN)/rtmdet-fast demo --out runs/demo

test: lint test-torch test-triton

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a process: two PyTorch processes with all the threads each slow each other many-fold.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-torch: setup
	$(PYTEST) tests

# The same parity tests, with every kernel run by Triton's interpreter on the CPU.
test-triton: setup
	TRITON_INTERPRET=1 RTMDET_FAST_KERNELS=triton $(PYTEST) $(KERNEL_TESTS)

# Every configuration that the launchers may pick, compiled for four GPUs: some 400, minutes each core.
test-slow: setup
	$(PYTEST) -m slow $(KERNEL_TESTS)

# On a CPU, what the assigner gains depends on malloc, whose settings take a process of their own.
bench: setup
	$(BIN)/python -m pytest benches --benchmark-only --benchmark-sort=name --benchmark-columns=median,iqr,rounds
	$(BIN)/python -m benches.run --malloc pinned --ops assign

bench-compare: setup
	$(BIN)/python -m benches.compare

gpu:
	$(PYTHON) -m benches.gpu

clean:
	rm -rf $(VENV) runs build dist *.egg-info
