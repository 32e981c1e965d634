"""Decode speed in vLLM on a GPU, sparse beside dense bf16 and FP8: `python benchmarks/vllm_gpu.py --out OUT.json`.

Every run is an engine in its own process, forked after vLLM has been imported, so that it starts with an empty GPU.
Sparse models are loaded from a compressed checkpoint, which is written first; dense ones get vLLM's random weights.
The plugin need not be installed: src/ on PYTHONPATH is enough.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODES = ("bf16", "fp8", "sparse", "copies")
"""Dense, rounded, sparse, and sparse with a dense copy of every weight beside it."""
COMPRESSED = ("sparse", "copies")
"""Those that load a compressed checkpoint, the same one."""

_MANY_TOKENS = 1024
"""A first token of more than the captured sizes: another kernel than theirs, the same for all larger ones."""

CATEGORIES = {
    "sparse Linears": r"spinfer",
    "attention": r"flash|fmha|attn|attention|reshape_and_cache",
    "collectives": r"nccl|all_?reduce|all_?gather|cross_device_reduce",
    "dense products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|wgmma|_mm_|::\w*mm$",
}
"""Kernel names of one decode step, the first match counts; what is left is norms, activations, rotary, sampling."""


def environment() -> None:
    """What the engines need, before vLLM is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions sent to tensor-parallel workers
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the process that is forked must not touch CUDA
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import importlib.metadata

    if not any(point.name == "spinfer" for point in importlib.metadata.entry_points(group="vllm.general_plugins")):
        info = Path(tempfile.mkdtemp(prefix="spinfer-plugin-")) / "spinfer-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spinfer\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[vllm.general_plugins]\nspinfer = spinfer.integrations.vllm:register\n")
        paths = [str(ROOT / "src"), str(info.parent)]
        sys.path[:0] = paths
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])


def forked(
    job: Callable[..., Iterator[dict[str, Any]]],
    *arguments: Any,
    limit_s: float,
    progress: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run a job in a child process; the last of what it yields, with "error" beside it where the job did not end well.

    Args:
        job: yields what it has, each time more.
        arguments: of the job.
        limit_s: it is stopped after so many seconds.
        progress: is given everything but the last.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        try:
            for found in job(*arguments):
                sender.send(found)
            sender.send(None)
        except BaseException:
            sender.send({"error": traceback.format_exc()[-4000:]})

    process = context.Process(target=child)
    process.start()
    sender.close()
    ends, result = time.monotonic() + limit_s, {}
    try:
        while receiver.poll(max(0.0, ends - time.monotonic())):
            found = receiver.recv()
            if found is None or "error" in found:
                process.join(60)  # it stops its workers
                return result | (found or {})
            result = found
            progress(result)
        return result | {"error": f"stopped after {limit_s:.0f} s"}
    except EOFError:
        return result | {"error": "the process died"}
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def prepare(
    name: str, directory: Path, sparsity: float, tokens: Sequence[int], device: str
) -> Iterator[dict[str, Any]]:
    """Write the compressed checkpoint, and meanwhile compile the kernels that it will need."""
    import torch
    from random_models import SHAPES, write_compressed

    import spinfer

    shape = SHAPES[name]
    hidden = shape["hidden_size"]
    began = time.perf_counter()
    torch.zeros(1, device=device)  # CUDA starts before the threads do

    def compile_kernels(rows: int, count: int) -> None:
        dense = torch.zeros(rows, hidden, dtype=torch.bfloat16, device=device)
        dense[:, ::2] = 1
        spinfer.linear(dense.new_zeros(count, hidden), spinfer.pack(spinfer.encode(dense)))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(compile_kernels, rows, count) for rows in (2048, 16384) for count in tokens]
        nbytes = write_compressed(shape, directory, sparsity=sparsity, device=device)
        written_s = time.perf_counter() - began
        for job in jobs:
            job.result()
    yield {"nbytes": nbytes, "write_s": round(written_s, 1), "seconds": round(time.perf_counter() - began, 1)}


def capture_sizes(batches: Sequence[int], inputs: Sequence[int]) -> list[int]:
    """The sizes, of those that vLLM captures CUDA graphs for by default, that decode steps and first tokens here need.

    All of them would take minutes to capture, and engines for fewer requests than a server's would have fewer.
    """
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
    counts = {*batches, *(batch * length for batch in batches for length in inputs)}
    return sorted({next(size for size in sizes if size >= count) for count in counts if count <= sizes[-1]})


class Engine:
    """vLLM with one model: torch.compile and CUDA graphs on."""

    def __init__(self, directory: Path, mode: str, arguments: argparse.Namespace) -> None:
        from vllm import LLM

        if mode == "copies":
            os.environ["SPINFER_DENSE_COPIES_GIB"] = "1000"  # of all weights
        options: dict[str, Any] = {"load_format": "dummy" if mode in ("bf16", "fp8") else "auto"}
        if mode == "fp8":
            options["quantization"] = "fp8"
        if arguments.enforce_eager:
            options["enforce_eager"] = True
        elif arguments.device == "cuda":
            options["compilation_config"] = {
                "cudagraph_capture_sizes": capture_sizes(arguments.batches, arguments.inputs)
            }
            if arguments.cudagraph_mode:
                options["compilation_config"]["cudagraph_mode"] = arguments.cudagraph_mode
        if arguments.device == "cuda":
            options["kernel_config"] = {"enable_flashinfer_autotune": False, "enable_cutedsl_warmup": False}
        began = time.perf_counter()
        self.llm = LLM(
            model=str(directory),
            dtype="bfloat16",
            max_model_len=max(arguments.inputs) + arguments.new_tokens + 16,
            max_num_seqs=max(arguments.batches),
            max_num_batched_tokens=max(8192, max(arguments.inputs) + arguments.new_tokens + 16),
            gpu_memory_utilization=arguments.utilization,
            tensor_parallel_size=arguments.tensor_parallel,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            **options,
        )
        self.start_s = time.perf_counter() - began
        self._random = random.Random(0)
        self._vocabulary = self.llm.llm_engine.model_config.get_vocab_size()

    def facts(self) -> dict[str, Any]:
        """Memory and room for the KV cache, and what is captured."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        compilation = self.llm.llm_engine.vllm_config.compilation_config
        return {
            "start_s": round(self.start_s, 1),
            "cudagraph_mode": compilation.cudagraph_mode.name,
            "captured_sizes": compilation.cudagraph_capture_sizes,
            "kv_cache_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
            "weights_gib": [round(gib, 3) for gib in self.llm.collective_rpc(_weights_gib)],
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Greedy; returns seconds and tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert [len(each) for each in tokens] == [new_tokens] * len(prompts)
        return seconds, tokens

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        """Random token ids."""
        return [[self._random.randrange(10, self._vocabulary - 10) for _ in range(length)] for _ in range(batch)]

    def measure(self, batch: int, length: int, new_tokens: int, repeats: int) -> dict[str, Any]:
        """Time to the first token of the whole batch, and the decode steps after it; medians."""

        def timed(count: int, times: int) -> list[float]:
            return [self.generate(self.prompts(batch, length), count)[0] for _ in range(times)]

        timed(new_tokens, 1)
        launch_us = [self.llm.collective_rpc(_launch_us)[0]]
        first, whole = timed(1, repeats + 2), timed(new_tokens, repeats)
        launch_us.append(self.llm.collective_rpc(_launch_us)[0])
        step = (statistics.median(whole) - statistics.median(first)) / (new_tokens - 1)
        return {
            "batch": batch,
            "input": length,
            "new_tokens": new_tokens,
            "decode_ms": round(step * 1e3, 4),
            "decode_tokens_per_s": round(batch / step, 1),
            "end_to_end_tokens_per_s": round(batch * new_tokens / statistics.median(whole), 1),
            "ttft_ms": round(statistics.median(first) * 1e3, 2),
            "ttft_ms_all": [round(seconds * 1e3, 2) for seconds in first],
            "whole_s_all": [round(seconds, 4) for seconds in whole],
            "launch_us": [round(us, 1) for us in launch_us],
        }

    def profile(self, row: Mapping[str, Any], steps: int = 16) -> dict[str, Any]:
        """Time by kind of kernel of the first token, and of one decode step: `steps` more tokens less the first.

        Gaps are what the kernels of the first rank leave of the time in `row`, taken without a profiler. A collective
        counts from the rank's own arrival, so the ranks' differ by what one waits for another.
        """

        def kernels(count: int) -> list[dict[str, float]]:
            self.llm.collective_rpc(_start_profile)
            self.generate(self.prompts(row["batch"], row["input"]), count)
            return list(self.llm.collective_rpc(_stop_profile))

        kernels(1)
        firsts = kernels(1)
        ranks = [
            {name: (us - before.get(name, 0.0)) / steps for name, us in after.items()}
            for before, after in zip(firsts, kernels(1 + steps), strict=True)
        ]
        first, totals = _by_kind(firsts[0]), [_by_kind(each) for each in ranks]
        longest = sorted(ranks[0].items(), key=lambda item: -item[1])[:25]
        return {
            "batch": row["batch"],
            "input": row["input"],
            "step_us": totals[0],
            "step_us_of_ranks": totals,
            "gaps_us": round(row["decode_ms"] * 1e3 - sum(totals[0].values()), 1),
            "first_us": first,
            "first_gaps_us": round(row["ttft_ms"] * 1e3 - sum(first.values()), 1),
            "kernels_us": {name[:160]: round(us, 2) for name, us in longest},
        }

    def close(self) -> None:
        """Stop the workers; a process that ends without this has them killed, which vLLM calls unexpected."""
        self.llm.llm_engine.engine_core.shutdown()


def _by_kind(kernels: Mapping[str, float]) -> dict[str, float]:
    """Microseconds of each kind of kernel."""
    totals = dict.fromkeys((*CATEGORIES, "norms and the rest"), 0.0)
    for name, us in kernels.items():
        kind = next((k for k, pattern in CATEGORIES.items() if re.search(pattern, name, re.IGNORECASE)), None)
        totals[kind or "norms and the rest"] += us
    return {kind: round(us, 1) for kind, us in totals.items()}


def _weights_gib(worker: Any) -> float:
    """What one rank's weights take."""
    return sum(parameter.nbytes for parameter in worker.model_runner.model.parameters()) / 2**30


def _launch_us(worker: Any, times: int = 500) -> float:
    """Microseconds of the host for one small dense product: how fast it launches at this moment."""
    import torch

    x = torch.ones(64, 64, dtype=torch.bfloat16, device=worker.device)
    y = x @ x
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        torch.mm(x, x, out=y)
    return (time.perf_counter() - began) / times * 1e6


def _start_profile(worker: Any) -> None:
    """Profile one rank, in its own process, where alone its kernels are seen."""
    from torch import cuda, profiler

    kind = profiler.ProfilerActivity
    worker.step_profiler = profiler.profile(activities=[kind.CUDA if cuda.is_available() else kind.CPU])
    worker.step_profiler.start()


def _stop_profile(worker: Any) -> dict[str, float]:
    """Microseconds of one rank's kernels by name; on a CPU, of its operators."""
    from torch import autograd, cuda

    if cuda.is_available():
        cuda.synchronize()
    worker.step_profiler.stop()
    found: dict[str, float] = {}
    for event in worker.step_profiler.events():
        if event.is_user_annotation:
            continue
        if event.device_type == autograd.DeviceType.CUDA:
            found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us()
        elif not cuda.is_available():
            found[event.name] = found.get(event.name, 0.0) + event.self_cpu_time_total
    return found


def planned(directory: Path, mode: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """What `spinfer plan` says of the weights and the KV cache, to compare with."""
    import torch

    from spinfer.integrations.transformers.sizing import fit, model_size

    if mode not in ("bf16", *COMPRESSED) or arguments.device == "cpu":
        return None
    size = model_size(str(directory))
    weights = size.compressed_nbytes(arguments.sparsity) if mode in COMPRESSED else size.dense_nbytes
    if mode == "copies":
        weights += size.copies_nbytes
    memory = torch.cuda.get_device_properties(0).total_memory
    usable = int(memory * arguments.utilization) - 2 * 2**30  # the command's default reserve
    found = fit(size, weights, gpus=arguments.tensor_parallel, usable_nbytes=usable, context=max(arguments.inputs))
    return {"weights_gib": round(weights / arguments.tensor_parallel / 2**30, 3), "kv_cache_tokens": found.kv_tokens}


def run(directory: Path, mode: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All measurements of one engine, given again after each."""
    engine = Engine(directory, mode, arguments)
    try:
        result = engine.facts() | {"planned": planned(directory, mode, arguments), "rows": [], "profiles": []}
        for length in arguments.inputs:
            for batch in (batch for batch in arguments.batches if batch * length <= arguments.most_prompt_tokens):
                if batch * (length + arguments.new_tokens) > result["kv_cache_tokens"]:
                    result.setdefault("does_not_fit", []).append({"batch": batch, "input": length})
                    continue
                row = engine.measure(batch, length, arguments.new_tokens, arguments.repeats)
                print(mode, json.dumps(row), file=sys.stderr, flush=True)
                result["rows"].append(row)
                yield result
                if batch in arguments.profile and length == arguments.inputs[0]:
                    result["profiles"].append(engine.profile(row))
        yield result
    finally:
        engine.close()


def greedy_vllm(directory: Path, prompts: list[list[int]], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Continue each prompt greedily in vLLM, one at a time."""
    arguments = argparse.Namespace(**vars(arguments) | {"tensor_parallel": 1, "utilization": 0.5})
    engine = Engine(directory, "sparse", arguments)
    try:
        yield {"tokens": [engine.generate([prompt], 32)[1][0] for prompt in prompts]}
    finally:
        engine.close()


def greedy_transformers(directory: Path, prompts: list[list[int]], device: str) -> Iterator[dict[str, Any]]:
    """The same in transformers, with the lead of each chosen token's logit over the next."""
    import torch
    from transformers import AutoModelForCausalLM

    import spinfer  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map=device).eval()
    tokens, leads = [], []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt], device=device),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens.append(output.sequences[0, len(prompt) :].tolist())
        best = torch.cat(output.logits).float().topk(2).values
        leads.append([round(lead, 4) for lead in (best[:, 0] - best[:, 1]).tolist()])
    yield {"tokens": tokens, "leads": leads}


def compare(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Whether vLLM and transformers choose the same tokens of a real model on 20 prompts.

    At a difference, `lead` says by how much transformers' token led: bf16 logits of 16 to 32 have steps of 0.125.
    """
    from transformers import AutoTokenizer

    texts = (ROOT / "tests" / "serving" / "prompts.txt").read_text().splitlines()
    prompts = AutoTokenizer.from_pretrained(path)(texts)["input_ids"]
    ours = forked(greedy_vllm, path, prompts, arguments, limit_s=300)
    theirs = forked(greedy_transformers, path, prompts, arguments.device, limit_s=300)
    if "error" in ours or "error" in theirs:
        return {"vllm": ours, "transformers": theirs}
    differences = []
    for number, (a, b) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True)):
        at = next((i for i in range(len(b)) if a[i] != b[i]), None)
        if at is not None:
            differences.append({"prompt": number, "position": at, "lead": theirs["leads"][number][at]})
    return {"prompts": len(prompts), "same": len(prompts) - len(differences), "differences": differences}


def room(nbytes: int) -> Path | None:
    """A folder with room for a checkpoint, if there is one: in memory where it fits, which is fastest."""
    for candidate in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if candidate.is_dir() and shutil.disk_usage(candidate).free > 1.05 * nbytes:
            return Path(tempfile.mkdtemp(prefix="spinfer-models-", dir=candidate))
    return None


def checkpoint_nbytes(shape: dict[str, Any], sparsity: float) -> int:
    """About how large a compressed checkpoint becomes."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"]
    kv = shape.get("num_key_value_heads", heads) / heads
    mlp = 3 * shape["intermediate_size"] if "intermediate_size" in shape else 2 * shape["ffn_dim"]
    weights = layers * hidden * (hidden * (2 + 2 * kv) + mlp)
    embeddings = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    return int(weights * (16 * (1 - sparsity) + 1.1) / 8 + 2 * embeddings)


def device_facts(device: str) -> Iterator[dict[str, Any]]:
    """The GPU, and the versions of what ran on it."""
    import torch
    import vllm

    name = torch.cuda.get_device_name(0) if device == "cuda" else device
    yield {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "vllm": vllm.__version__}


def main() -> None:
    """Run what was asked for, model by model and mode by mode, and write the result after each."""
    environment()
    from random_models import SHAPES, write_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=["llama-3-8b"], choices=list(SHAPES))
    parser.add_argument("--directories", nargs="*", type=Path, default=[], help="models on disk, dense or compressed")
    parser.add_argument("--modes", nargs="+", default=["bf16", "fp8", "sparse"], choices=MODES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16, 32])
    parser.add_argument("--inputs", nargs="+", type=int, default=[128], help="prompt lengths")
    parser.add_argument("--most-prompt-tokens", type=float, default=math.inf, help="of a batch to measure")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--profile", nargs="*", type=int, default=[], help="batches to break a decode step down for")
    parser.add_argument("--utilization", type=float, default=0.9, help="of the GPU's memory")
    parser.add_argument("--cudagraph-mode", help="instead of vLLM's default, FULL_AND_PIECEWISE")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--folder", type=Path, help="for checkpoints; by default /dev/shm or the temporary folder")
    parser.add_argument(
        "--same-tokens", type=Path, help="a compressed model to compare with transformers, token by token"
    )
    parser.add_argument("--limit-s", type=float, default=300, help="most seconds of one run")
    parser.add_argument("--model-limit-s", type=float, default=1e9, help="most seconds of all runs of one model")
    parser.add_argument("--budget-s", type=float, default=1e9, help="of all models; what is measured by then is kept")
    parser.add_argument("--commit", help="of the code, where this is no git checkout")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try this script")
    arguments = parser.parse_args()

    began = time.perf_counter()
    import transformers  # noqa: F401  (imported once here: every run is forked from this process)
    import vllm.entrypoints.llm  # noqa: F401

    commit = (
        arguments.commit
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    result: dict[str, Any] = forked(device_facts, arguments.device, limit_s=120) | {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "sparsity": arguments.sparsity,
        "tensor_parallel": arguments.tensor_parallel,
        "import_s": round(time.perf_counter() - began, 1),
        "runs": [],
    }

    def write(runs: list[dict[str, Any]]) -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result | {"runs": runs}, indent=1) + "\n")

    def record(**entry: Any) -> None:
        result["runs"].append(entry)
        write(result["runs"])
        print(f"{time.perf_counter() - began:.0f} s: {entry.get('model')} {entry.get('mode', '')}", file=sys.stderr)
        if "error" in entry:
            print(entry["error"], file=sys.stderr, flush=True)

    def measure(directory: Path, limit_s: float, **names: str) -> None:
        """Record a run; meanwhile, what it has so far."""

        def progress(found: dict[str, Any]) -> None:
            write([*result["runs"], names | found | {"error": "not finished"}])

        found = forked(run, directory, names["mode"], arguments, limit_s=limit_s, progress=progress)
        record(**names, **found)

    tokens = [*capture_sizes(arguments.batches, arguments.inputs), _MANY_TOKENS]
    for name in arguments.models:
        model_began = time.perf_counter()
        nbytes = checkpoint_nbytes(SHAPES[name], arguments.sparsity)
        folder = arguments.folder or room(nbytes if set(COMPRESSED) & set(arguments.modes) else 0)
        if folder is None:
            record(model=name, error=f"no room for a checkpoint of {nbytes / 1e9:.0f} GB; give --folder")
            continue

        def left_s(since: float = model_began) -> float:
            now = time.perf_counter()
            return min(arguments.limit_s, arguments.model_limit_s - (now - since), arguments.budget_s - (now - began))

        directories = {
            mode: folder / f"{name}-{'compressed' if mode in COMPRESSED else mode}" for mode in arguments.modes
        }
        written: set[Path] = set()
        try:
            for mode in arguments.modes:
                directory = directories[mode]
                if mode in COMPRESSED and directory not in written and left_s() > 0:
                    job = (prepare, name, directory, arguments.sparsity, tokens, arguments.device)
                    made = forked(*job, limit_s=left_s())
                    record(model=name, mode="prepare", **made)
                    if "error" in made:
                        continue
                    written.add(directory)
                elif mode not in COMPRESSED:
                    write_config(SHAPES[name], directory)
                if left_s() > 0:
                    measure(directory, left_s(), model=name, mode=mode)
                else:
                    record(model=name, mode=mode, error="not started: out of time")
        finally:
            for directory in directories.values():
                shutil.rmtree(directory, ignore_errors=True)
            if arguments.folder is None:
                shutil.rmtree(folder, ignore_errors=True)
    for directory in arguments.directories:
        measure(directory, arguments.limit_s, model=directory.name, mode="on disk")
    if arguments.same_tokens is not None:
        record(model=arguments.same_tokens.name, mode="same tokens", **compare(arguments.same_tokens, arguments))
    if any("error" in entry for entry in result["runs"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
