# Everything runs in .venv at the project's root; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CODE := src tests demo benchmarks

.PHONY: demo test test-native quality bench-cpu bench-gpu bench-pruning readme clean

$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[demo,test,quality,bench]'
	touch $@

demo: $(VENV)/.installed
	$(PY) demo/run.py

test: $(VENV)/.installed
	$(PY) -m pytest

test-native: $(VENV)/.installed  # the C++ under AddressSanitizer and UBSan, and 20,000 random or damaged layouts
	$(VENV)/bin/cmake -S . -B build/sanitize -DSPINFER_TESTS=ON -DSPINFER_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug
	$(VENV)/bin/cmake --build build/sanitize --parallel 2
	build/sanitize/test_cpu
	build/sanitize/fuzz_cpu

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy
	$(PY) benchmarks/readme.py --check

bench-cpu: $(VENV)/.installed
	$(PY) -m spinfer.bench.linear_cpu build/bench-cpu
	$(PY) -m spinfer.bench.linear_cpu_report build/bench-cpu

bench-gpu: $(VENV)/.installed
	$(PY) -m pip install --quiet --editable '.[cuda]'
	$(PY) -m spinfer.bench.kernel --out build/bench-gpu.json

bench-pruning: $(VENV)/.installed
	$(PY) benchmarks/pruning.py grid --out build/pruning.json
	$(PY) benchmarks/pruning.py plot build/pruning.json

readme: $(VENV)/.installed
	$(PY) benchmarks/readme.py

clean:
	rm -rf $(VENV) .demo build dist
