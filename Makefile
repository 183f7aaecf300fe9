# `make quickstart` trains a real cohort, `make test` runs every check. Both set up all they need in .venv.
PYTHON ?= python3
# DALI for CUDA 13, which PyPI's torch is built for; `make DALI=cuda12 ...` for drivers of CUDA 12.
DALI ?= cuda13
VENV := .venv
BIN := $(VENV)/bin
# Two processes on two cores: one thread each.
TWO := OMP_NUM_THREADS=1 $(BIN)/python launch/ranks.py --nproc-per-node=2

OLDEST := .venv-oldest
# A minute or two, of what talks to other packages.
WHERE_VERSIONS_MATTER := tests/data_pipelines/test_order.py tests/data_pipelines/test_bad_files.py \
  tests/data_pipelines/test_resident.py tests/engine/config/test_config.py tests/engine/reporting \
  tests/engine/cohort/test_optim.py tests/engine/cohort/test_parameter_groups.py tests/engine/training/test_step.py \
  tests/models/test_weight_files.py tests/launch/test_train.py tests/launch/test_export.py

.PHONY: help setup quickstart test test-oldest test-slurm lint clean

help:
	@echo "make setup       install everything into .venv (a few GB, some minutes the first time)"
	@echo "make quickstart  train two small networks alone and then teaching each other, and compare them"
	@echo "make test        lint, types, import rules and tests"
	@echo "make test-oldest some of the tests with the oldest versions that setup.py allows (Python 3.10 to 3.12)"
	@echo "make test-slurm  tests of jobs on a real Slurm of two virtual nodes, which it installs and starts here (as root)"
	@echo "make clean       remove .venv and caches; runs/ stays"

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; try make PYTHON=python3.12"; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "python3-venv is missing, installing it"; rm -rf $(VENV); \
	  SUDO=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); }
	@echo "installing PyTorch, DALI, timm and the rest into $(VENV): a few GB, some minutes"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev,dali-$(DALI)]"
	@touch $@

quickstart: setup
	@echo "1/3: two networks, each alone"
	@$(TWO) launch/train.py configs/fashion_mnist/quickstart_independent.yaml
	@echo "2/3: the same two networks, teaching each other (deep mutual learning)"
	@$(TWO) launch/train.py configs/fashion_mnist/quickstart_dml.yaml
	@echo "3/3: side by side"
	@$(BIN)/python launch/report.py runs/quickstart-independent runs/quickstart-dml --out runs/quickstart
	@cat docs/results/quickstart/expect.txt

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A worker for each core, with one thread each; one that is done takes over half of what another has left.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# With torch and whatever is not named in setup.py as .venv has them: those are gigabytes. TensorBoard among them is too
# new for the protobuf of an old wandb.
test-oldest: setup
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(OLDEST)/others.pth
	@mv $(OLDEST)/others.pth $$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	@$(OLDEST)/bin/pip install --quiet --disable-pip-version-check $$($(BIN)/python tests/oldest.py torch torchvision)
	PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest -W ignore::DeprecationWarning \
	  --ignore tests/engine/reporting/test_tensorboard_run.py $(WHERE_VERSIONS_MATTER)

test-slurm: setup
	tests/slurm/cluster.sh run $(BIN)/python -m pytest -m slurm tests/slurm

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
