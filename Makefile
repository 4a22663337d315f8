# The whole interface: demo, test, lint, bench, examples, test-oldest.
# DATA is the folder of public logits and texts for `make bench`; without it the calibrators' and the losses' are skipped.
# PIP_ARGS goes to every pip install, for instance an index of CPU wheels: make demo PIP_ARGS="--index-url ..."

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
DATA ?=
NO_DATA = "calibrators.py and training.py skipped: make bench DATA=FOLDER, with the files that problems.py names"
CONSTRAINTS ?= constraints.txt
TRANSFORMERS = $(shell grep '^transformers==' $(CONSTRAINTS))
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
SOURCES = $(shell find hf_calib -type f -not -name '*.pyc') pyproject.toml
OLDEST_TRANSFORMERS = 5.20.0

.PHONY: demo test lint bench examples test-oldest clean

demo: $(VENV)/.package
	$(BIN)/hf-calib demo

# Run from tests/, so that what is imported is the installed wheel and never the source beside it.
test: $(VENV)/.test $(VENV)/.package
	cd tests && $(abspath $(BIN))/pytest

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.test $(VENV)/.package
	$(BIN)/python examples/benchmarks/speed.py
	$(BIN)/python examples/benchmarks/stream.py
	$(BIN)/python examples/benchmarks/transformer.py
	$(BIN)/python examples/benchmarks/losses.py
	$(BIN)/python examples/benchmarks/demo.py
	$(if $(DATA),$(BIN)/python examples/benchmarks/text_logits.py --data $(DATA),@echo $(NO_DATA))
	$(if $(DATA),$(BIN)/python examples/benchmarks/calibrators.py --data $(DATA))
	$(if $(DATA),$(BIN)/python examples/benchmarks/training.py --data $(DATA))
	$(BIN)/python examples/benchmarks/readme.py

examples: $(VENV)/.test $(VENV)/.package
	$(BIN)/python examples/calibrate_logits.py
	$(BIN)/python examples/train_from_text.py
	$(BIN)/python examples/train_from_text.py --decoder-only

test-oldest:
	sed -e '/^transformers==/d' constraints.txt > .oldest-constraints.txt
	echo 'transformers==$(OLDEST_TRANSFORMERS)' >> .oldest-constraints.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=.oldest-constraints.txt

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# Dependencies first, so that a change of the source reinstalls the package alone.
$(VENV)/.dependencies: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	$(PIP) -c $(CONSTRAINTS) '.[plots]'
	touch $@

$(VENV)/.package: $(VENV)/.dependencies $(SOURCES)
	rm -rf build
	$(PIP) --no-deps --force-reinstall .
	touch $@

# With transformers' own tests of models, which are in its source distribution only; tests/models/upstream.py
$(VENV)/.test: $(VENV)/.dependencies
	$(PIP) -c $(CONSTRAINTS) '.[test]'
	$(BIN)/python -m pip download --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --no-binary transformers \
		--dest $(VENV)/transformers-tests $(TRANSFORMERS)
	cd $(VENV)/transformers-tests && tar -xzf $(subst ==,-,$(TRANSFORMERS)).tar.gz
	touch $(VENV)/transformers-tests/$(subst ==,-,$(TRANSFORMERS))/tests/__init__.py
	touch $@

$(VENV)/.lint: $(VENV)/.created $(CONSTRAINTS)
	$(PIP) -c $(CONSTRAINTS) ruff
	touch $@

clean:
	rm -rf .venv .venv-oldest .oldest-constraints.txt build dist *.egg-info
