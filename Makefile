# Everything runs in .venv at the project's root; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CODE := src tests demo benchmarks

.PHONY: demo test quality readme clean

$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[demo,test,quality]'
	touch $@

demo: $(VENV)/.installed
	$(PY) demo/run.py

test: $(VENV)/.installed
	$(PY) -m pytest

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy
	$(PY) benchmarks/readme.py --check

readme: $(VENV)/.installed
	$(PY) benchmarks/readme.py

clean:
	rm -rf $(VENV) .demo build dist
