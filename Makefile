# Two commands: `make demo` (three phases, evaluation and plot on the embedded default) and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN ?= tiny
PY = $(VENV)/bin/python

.PHONY: demo test clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/installed
	$(PY) warmup.py --run $(RUN)
	$(PY) mine.py --run $(RUN)
	$(PY) distill.py --run $(RUN)
	for checkpoint in init warmup mine distill; do $(PY) evaluate.py --run $(RUN) --checkpoint $$checkpoint || exit; done
	$(PY) evaluate.py --run $(RUN) --checkpoint mine --skills
	$(PY) plot.py --run $(RUN)

test: $(VENV)/installed
	$(PY) -m pytest -q tests

clean:
	rm -rf runs $(VENV)
