# `make demo` (three phases, evaluation and plot on the embedded default), `make demo-webshop` (the
# same in the embedded shop) and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN ?= tiny
FLAGS ?=
PY = $(VENV)/bin/python

.PHONY: demo demo-webshop control test clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/installed
	$(PY) warmup.py --run $(RUN) $(FLAGS)
	$(PY) mine.py --run $(RUN) $(FLAGS)
	$(PY) distill.py --run $(RUN) $(FLAGS)
	for checkpoint in init warmup mine distill; do $(PY) evaluate.py --run $(RUN) $(FLAGS) --checkpoint $$checkpoint || exit; done
	$(PY) evaluate.py --run $(RUN) $(FLAGS) --checkpoint mine --skills
	$(PY) -m tools.plot --run $(RUN)

# GiGPO from the warm-up of the demo, for as many episodes: what SIRI has to be compared with
control: $(VENV)/installed
	$(PY) mine.py --run $(RUN)-control --fork $(RUN) --skill_share 0 $(FLAGS)
	$(PY) distill.py --run $(RUN)-control $(FLAGS)
	$(PY) evaluate.py --run $(RUN)-control $(FLAGS)

demo-webshop:
	$(MAKE) demo RUN=tiny-webshop FLAGS="--env webshop"

test: $(VENV)/installed
	$(PY) -m pytest -q -n 2 tests

clean:
	rm -rf runs $(VENV)
