# Every target makes its own virtual environment: `make demo` works in a fresh clone.
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    # the small CPU build of torch
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.memfit
JOBS ?= 2
TORCH_INDEX ?=
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_INDEX) -c constraints.txt
# make integrations STACKS=flagembedding    # the tests of one stack; every stack is a file of pinned versions
STACKS ?= $(sort $(basename $(notdir $(wildcard tests/integrations/stacks/*.txt))))
INTEGRATIONS := $(STACKS:%=integrations-%)

.PHONY: demo test check format clean tcmalloc integrations $(INTEGRATIONS)
.DEFAULT_GOAL := help

help:
	@echo "make demo    fine-tune a real model under a memory budget (about 6 minutes on 2 cores)"
	@echo "make test    run the tests"
	@echo "make check   what CI runs: format, lint, types, tests, the README's commands"
	@echo "make integrations  what CI runs then: training stacks such as FlagEmbedding, each in an environment of its own"
	@echo "make format  rewrite the sources in the house format"
	@echo "make clean   remove what the other targets made"

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Memfit needs Python 3.11 or later: set PYTHON=")'

$(BIN)/python:
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, older than what it was made from: a second `make` installs nothing.
$(STAMP)-%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[$*]'
	@touch $@

# On CPU the allocator decides much of the peak. Nothing fails without this one; `memfit doctor` says what is used.
tcmalloc:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! ldconfig -p | grep -q libtcmalloc_minimal; then \
		timeout 120 apt-get install -y -qq libtcmalloc-minimal4 >/dev/null 2>&1 || true; \
	fi

demo: $(STAMP)-report,demo tcmalloc
	$(BIN)/python -m demo.code_search

# The slow tests read the memory of whole processes: one after the other, with nothing beside them.
test: $(STAMP)-dev tcmalloc
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"
	$(BIN)/python -m pytest -m slow

check: $(STAMP)-dev tcmalloc
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"
	$(BIN)/python -m pytest -m slow

TESTS_deepspeed := tests/integrations/test_deepspeed_predictions.py
TESTS_distributed := $(addprefix tests/integrations/test_distributed_,contrastive.py predictions.py)
TESTS_transformers := $(addprefix tests/integrations/test_transformers_,fsdp.py peft.py)

integrations: $(INTEGRATIONS)

$(INTEGRATIONS): integrations-%: .integrations/%/.memfit tcmalloc
	.integrations/$*/bin/python -m pytest tests/integrations/test_$*.py $(TESTS_$*)

.integrations/%/.memfit: tests/integrations/stacks/%.txt pyproject.toml
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .integrations/$*
	.integrations/$*/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_INDEX) -r $< -e .
	@touch $@

format: $(STAMP)-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .integrations build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks demo -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
