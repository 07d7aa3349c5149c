# make demo: prune a small Llama on real text, from nothing; make test: the tests; make test-full: also the slow ones
# make kernels: compile the GPU kernels for chips that are not here and check the machine code
# make evidence: make every run of experiments/PLAN.md anew in out/evidence, hours; it resumes when killed; STUDIES=A: one
# make report: tables and figures of the published runs, or of yours: RESULTS=out/evidence/results.jsonl
# Each creates .venv and installs what it needs on the first call.

PYTHON ?= python3
PY := .venv/bin/python
RESULTS ?= experiments/results.jsonl
STUDIES ?= A B smollm2 languages law added longer
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist=worksteal

.PHONY: demo test test-full kernels bench evidence report docs lint clean

demo: .venv/run
	$(PY) data/embedded/prepare.py
	$(PY) demo.py

test: .venv/dev
	$(PYTEST) -m "not full"

test-full: .venv/dev
	$(PYTEST)

kernels: .venv/run
	$(PY) -m kernels.machine_code

bench: .venv/dev
	$(PY) bench.py

evidence: .venv/dev
	$(PY) data/embedded/prepare.py
	for data in $(filter smollm2 languages,$(STUDIES)); do $(PY) data/$$data/prepare.py || exit 1; done
	for study in $(STUDIES); do $(PY) -m experiments.run --study=$$study || exit 1; done
	$(PY) -m experiments.report --results=out/evidence/results.jsonl

report: .venv/run
	$(PY) -m experiments.report --results=$(RESULTS)

docs: .venv/run  # the table of settings, from the comments in train.Config
	$(PY) configurator.py > docs/configuration.md

lint: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv out data/*/*.bin data/*/meta.json data/*/tokenizer* data/*/download data/smollm2/model data/smollm2/data

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"Python 3.10 to 3.13 is needed and $(PYTHON) is {v[0]}.{v[1]}: call make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@
