# Everything runs in the folder's own .venv, which the first target sets up.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
DOCS := .venv-docs
DIST := .venv-dist
MUTANTS := .mutants
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
REQUIREMENTS := requirements/torch.txt requirements/fairseq.txt requirements/hf.txt requirements/dev.txt
WORKERS ?= 2
# A worker runs whole files, in their order: the last ones are short.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# All versions are pinned, so nothing but torch's step looks for more (its builds differ in what they need); modules are
# compiled to bytecode when they are first imported, not all at once.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/python $(INSTALL)
# Optimising what fairseq compiles against torch's headers takes minutes, and its fast loops of Python say -O3 themselves.
FAST_BUILD := CFLAGS="-O0 -g0" CXXFLAGS="-O0 -g0"

.PHONY: setup quick demo demo-hf test test-slow test-oldest test-fuzz test-kill test-mutants docs dist lint types format clean

setup: $(STAMP)

$(STAMP): $(REQUIREMENTS) setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		(echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.11" >&2; exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/torch.txt
	$(FAST_BUILD) $(PIP) --no-build-isolation --no-deps fairseq-fixed==0.12.3.1 & built=$$!; \
		$(PIP) --no-build-isolation --no-deps -r requirements/fairseq.txt -r requirements/hf.txt \
		-r requirements/dev.txt; installed=$$?; wait $$built && exit $$installed
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

# Threads that spin while they wait for one another take most of the time on a machine that does something else too.
quick: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/python -m hf_plugin.quick

demo: $(STAMP)
	$(BIN)/python -m fairseq_plugin.demo

demo-hf: $(STAMP)
	$(BIN)/python -m hf_plugin.demo

# The types are checked beside the tests; what is wrong with them is told after the tests.
test: $(STAMP) lint
	@$(BIN)/mypy >$(VENV)/types 2>&1 & checked=$$!; OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST); tested=$$?; \
		wait $$checked || { cat $(VENV)/types; exit 1; }; exit $$tested

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow

# The transformers tests on the oldest version that is supported, in a virtual environment of their own.
test-oldest: $(OLDEST)/.set-up
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) tests/hf

$(OLDEST)/.set-up: requirements/oldest/hf.txt $(REQUIREMENTS)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) -r requirements/torch.txt
	grep -hviE '^(transformers|tokenizers|huggingface_hub|typer)==' requirements/hf.txt requirements/dev.txt | \
		cat - requirements/oldest/hf.txt >$(OLDEST)/requirements.txt
	grep -hE '^(scikit-learn|scipy|joblib|threadpoolctl|narwhals|tqdm|packaging|PyYAML|regex|click)==' \
		requirements/fairseq.txt >>$(OLDEST)/requirements.txt
	$(OLDEST)/bin/python $(INSTALL) -r $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python $(INSTALL) --no-build-isolation --no-deps -e .
	touch $@

# 1000 damaged inputs of every kind that is read; their table is in docs/fuzzing.md.
test-fuzz: $(STAMP)
	OMP_NUM_THREADS=1 nice $(BIN)/python -m tests.fuzz.run --write docs/fuzzing.md

# kill -9 at 50 random moments of a run in each host, resumed; goes on where a call before it was ended.
test-kill: $(STAMP)
	OMP_NUM_THREADS=1 nice $(BIN)/python -m tests.lanes.kill

# Do the tests notice when a line says something else? Goes on where a call before it was ended.
test-mutants: $(STAMP) $(MUTANTS)/.set-up
	OMP_NUM_THREADS=1 PYTHONPATH=$(MUTANTS) nice $(BIN)/python -m tests.lanes.mutants

$(MUTANTS)/.set-up: requirements/mutants.txt
	$(PIP) --no-deps --upgrade --target $(MUTANTS) -r requirements/mutants.txt
	touch $@

# The site, in site/. It reads the code without importing it, so it needs nothing of .venv.
docs: $(DOCS)/.set-up
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --clean

$(DOCS)/.set-up: requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(INSTALL) -r requirements/docs.txt ruff \
		$(REQUIREMENTS:%=-c %)
	touch $@

# The wheel and the source distribution, in dist/, with what an index would refuse.
dist: $(DIST)/.set-up
	rm -rf dist
	$(DIST)/bin/python -m build --no-isolation
	$(DIST)/bin/twine check --strict dist/*

$(DIST)/.set-up: requirements/dist.txt
	test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python $(INSTALL) -r requirements/dist.txt setuptools wheel packaging \
		$(REQUIREMENTS:%=-c %) -c requirements/docs.txt
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(DOCS) $(DIST) $(MUTANTS) dist .mypy_cache build site *.egg-info demo-output demo-hf-output quick-output
