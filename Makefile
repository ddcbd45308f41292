# make test   lint and tests          make demo   the shipped demonstration
# make lint   ruff alone              make clean  everything made here, .venv included
#
# Each sets up what it needs: a virtual environment in .venv with the tested versions (constraints.txt) and this
# package, editable. It is used again until constraints.txt, pyproject.toml, setup.py or csrc/ change.
# PYTHON=python3.12 chooses the interpreter; NUNCHAKU_PY_CUDA and NUNCHAKU_PY_CUDA_TARGETS (see setup.py) the build.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# The constraints keep every later install at the torch that is there.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c $(CONSTRAINTS)
NATIVE := setup.py $(shell find csrc -type f)
PYTEST_ARGS ?=

.PHONY: test demo lint clean
.DELETE_ON_ERROR:

test: lint
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: $(VENV)/installed
	@$(BIN)/nunchaku-py demo

lint: $(VENV)/installed
	@$(BIN)/ruff check .

# torch first and by itself, so that the choice of its build is pip's own and nothing later changes it.
$(VENV)/torch: $(CONSTRAINTS)
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch"
	@$(PIP) torch
	@$(PIP) setuptools wheel pybind11
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml $(NATIVE)
	@packages=$$($(BIN)/python -c 'import setup; print(*setup.cuda_requirements())') && \
		if [ -n "$$packages" ]; then echo "installing nvcc: $$packages"; $(PIP) $$packages; fi
	@echo "building nunchaku-py and installing what it needs (versions of $(CONSTRAINTS))"
	@$(PIP) --no-build-isolation -e '.[pipelines,test]'
	@$(BIN)/python -m nunchaku_py.native
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache nunchaku_py/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
