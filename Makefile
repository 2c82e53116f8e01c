# `make quickstart` and `make test` are the two commands; each installs first what is missing.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: setup data quickstart test soak clean

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77,<81" wheel
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

data: setup
	$(PY) -m training.prepare_data --embedded --vocab_size 8192 --out data/quickstart

quickstart: data
	$(PY) -m training.quickstart

test: setup
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile  # a launch waits half of its time

soak: setup
	$(PY) -m pytest -m slow  # kills, and a run of 5,000 steps, which takes about 20 minutes on two busy cores

clean:
	rm -rf outputs data .cache
