# make demo    set up, write a small corpus, train on it to its target, show the result
# make test    set up, run the tests
# make setup   the environment alone
# make reproduce RECORD=04-muon [GPUS=8] [SEEDS=4] [ARGS="key=value ..."]
#              a published record: check, fetch what is missing, run, report, verdict
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo test schema reproduce
setup: $(VENV)/.run

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and "Python 3.10 to 3.13 is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/.test: requirements-dev.txt $(VENV)/.run
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

demo: $(VENV)/.run
	$(RUN) -m scripts.demo

reproduce: $(VENV)/.run
	$(RUN) -m scripts.reproduce '$(RECORD)' $(if $(GPUS),--gpus $(GPUS)) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

test: $(VENV)/.test
	$(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

schema: $(VENV)/.run
	$(RUN) -m harness.schema
