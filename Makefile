# make demo: prune a small Llama on real text, from nothing; make test: prove the pieces;
# make kernels: compile the GPU kernels for chips that are not here and check the machine code;
# make evidence: every run of experiments/PLAN.md made anew in out/evidence, hours; resumes when killed;
# make report: tables and figures of the published runs, or of yours, as far as they are: RESULTS=out/evidence/results.jsonl
# Each creates .venv and installs what it needs on the first call.

PYTHON ?= python3
PY := .venv/bin/python
RESULTS ?= experiments/results.jsonl

.PHONY: demo test test-full chaos kernels bench evidence evidence-smollm2 report lint clean

demo: .venv/run
	$(PY) data/embedded/prepare.py
	$(PY) demo.py

test: .venv/dev
	$(PY) -m pytest -q -m "not full"

test-full: .venv/dev
	$(PY) -m pytest -q

kernels: .venv/run
	$(PY) -m kernels.machine_code

bench: .venv/dev
	$(PY) bench.py

chaos: .venv/dev
	$(PY) tests/chaos.py

evidence: .venv/run
	$(PY) data/embedded/prepare.py
	$(PY) -m experiments.run
	$(PY) -m experiments.report --results=out/evidence/results.jsonl

evidence-smollm2: .venv/dev
	$(PY) data/smollm2/prepare.py
	$(PY) -m experiments.run --study=smollm2
	$(PY) -m experiments.report --results=out/evidence/results.jsonl

report: .venv/run
	$(PY) -m experiments.report --results=$(RESULTS)

lint: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv out data/embedded/*.bin data/embedded/meta.json data/embedded/tokenizer.model data/*/download data/smollm2/model data/smollm2/data

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"Python 3.10 to 3.13 is needed and $(PYTHON) is {v[0]}.{v[1]}: call make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@
