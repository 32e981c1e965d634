#!/usr/bin/env bash
# Every result of this machine's CPU, in 15 to 20 minutes on two quiet cores: benchmarks/cpu.sh DIRECTORY [PRUNED_SMOLLM2]
# Resumes what it finds in DIRECTORY, and measures rows again that other processes disturbed. `make demo` leaves a pruned
# model in .demo/smollm2-135m-pruned.
set -euo pipefail
directory=$1 model=${2-}
python=${PYTHON:-.venv/bin/python}
linear() { "$python" -m spinfer.bench.linear_cpu "$@" --seconds "${SECONDS_A_ROW:-0.8}" --enough 3; }

linear "$directory"
for dtype in fp16 fp32; do
  linear "$directory" --dtype $dtype --models Llama-2-7B --tokens 1 4 16 64 --sparsities 0.5 0.7 --threads 2
done
# torch held to AVX2, against our AVX2 tier
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 SPINFER_CPU_TIER=avx2 \
  linear "$directory-avx2" --models Llama-2-7B --tokens 1 4 8 16 --sparsities 0.5 0.7 --threads 2
"$python" -m spinfer.bench.linear_cpu_report "$directory"
"$python" -m spinfer.bench.linear_cpu_report "$directory-avx2"
"$python" benchmarks/pack_cpu.py "$directory/pack.json"
"$python" benchmarks/decode_cpu.py "$directory/decode_llama1b.json"
if [ -n "$model" ]; then "$python" benchmarks/decode_cpu.py "$directory/decode_smollm2.json" "$model"; fi
