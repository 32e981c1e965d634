"""What pruning costs: perplexity against size, time and memory.

    python benchmarks/pruning.py grid  --model DIR --calibration FILE --evaluation FILE --out RESULTS/pruning.json
    python benchmarks/pruning.py plot  RESULTS/pruning.json          # perplexity against bits a weight, as SVG
    python benchmarks/pruning.py large --out RESULTS/pruning_8b.json --blocks 32
    python benchmarks/pruning.py speed --model DIR --calibration FILE --out RESULTS/pruning_speed.json

`grid` prunes one model by every method, allocation and sparsity, and evaluates each on text that calibration did not
see. Its reference points are the dense model and one rounded to 8 and to 4 bits, to the nearest of levels that are
symmetric about zero, with one 16-bit scale for 64 weights of a row. `large` prunes the first blocks of a random model
of Llama-3-8B's shape, whose weights are in RAM and whose blocks go to the GPU one at a time. `speed` times the command
`spinfer prune` as a process of its own. Without --model, --calibration and --evaluation, those of the demo are fetched.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import spinfer
from spinfer.bench.processor import processor
from spinfer.evaluation import perplexity
from spinfer.integrations.transformers.blocks import decoder_blocks, record
from spinfer.integrations.transformers.matrices import targets
from spinfer.integrations.transformers.models import load_causal_lm
from spinfer.integrations.transformers.pruning import LoadedBlocks, calibrating
from spinfer.pruning import Recipe, read_texts, sample_tokens
from spinfer.pruning.allocation import OUTLIER_FACTOR, owl_sparsities
from spinfer.pruning.calibration import digest
from spinfer.pruning.report import BlockReport
from spinfer.pruning.sequence import outlier_shares, prune_blocks

METHODS = ("magnitude", "wanda", "sparsegpt")
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
CONTEXT = 1024
ROUNDING_GROUP = 64

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LLAMA_8B_BLOCKS = 32


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    return found | {"spinfer": spinfer.__version__} | {name: version(name) for name in ("torch", "transformers")}


def synchronize(device: torch.device) -> None:
    """Wait until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrices_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All weights that pruning is about."""
    blocks = decoder_blocks(model)
    chosen = targets(model, blocks, ())
    for index in range(len(blocks.names)):
        for matrix in chosen.matrices(model, index):
            yield matrix.name, matrix.weight


def encoded_bits(model: PreTrainedModel) -> float:
    """Bits a weight of the pruned matrices, encoded."""
    sizes = [(8 * spinfer.encode(weight).nbytes, weight.numel()) for _, weight in matrices_of(model)]
    return sum(bits for bits, _ in sizes) / sum(weights for _, weights in sizes)


def round_to_nearest_(model: PreTrainedModel, bits: int) -> float:
    """Round every matrix in place; returns bits a weight with the scales."""
    levels = 2 ** (bits - 1) - 1
    for name, weight in matrices_of(model):
        if weight.shape[1] % ROUNDING_GROUP:
            raise SystemExit(f"{name}: {weight.shape[1]} inputs are no multiple of {ROUNDING_GROUP}")
        groups = weight.float().view(weight.shape[0], -1, ROUNDING_GROUP)
        scales = (groups.abs().amax(-1, keepdim=True) / levels).half().float().clamp_min(torch.finfo(torch.half).tiny)
        weight.copy_(((groups / scales).round().clamp(-levels, levels) * scales).view_as(weight))
    return bits + 16 / ROUNDING_GROUP


def grid(args: argparse.Namespace) -> dict[str, Any]:
    """Every method, allocation and sparsity, and the reference points."""
    device = torch.device(args.device)
    began = time.perf_counter()
    dense, tokenizer = load_causal_lm(str(args.model), device=args.device)

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, verbose=False)["input_ids"])

    samples = sample_tokens(
        read_texts(args.calibration),
        tokenize,
        sequence_length=args.sequence_length,
        num_samples=args.num_samples,
        seed=args.seed,
    ).to(device)
    text = torch.tensor(tokenize("\n\n".join(read_texts(args.evaluation)))[: args.eval_tokens], device=device)
    batch = 8 if device.type == "cuda" else 1
    result = {
        "model": args.name,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "num_samples": args.num_samples,
        "sequence_length": args.sequence_length,
        "seed": args.seed,
        "samples_sha256": digest(samples),
        "evaluated_tokens": 0,
        "context": CONTEXT,
        "weights": sum(weight.numel() for _, weight in matrices_of(dense)),
        **environment(device),
    }

    def evaluate(model: PreTrainedModel) -> float:
        found = perplexity(model, text, context=CONTEXT, batch=batch)
        result["evaluated_tokens"] = found.tokens
        return found.perplexity

    references = [{"name": f"dense {result['dtype']}", "bits_per_weight": 16.0, "perplexity": evaluate(dense)}]
    for bits in (8, 4):
        rounded = copy.deepcopy(dense)
        cost = round_to_nearest_(rounded, bits)
        references.append({"name": f"rounded to {bits} bits", "bits_per_weight": cost, "perplexity": evaluate(rounded)})
    for reference in references:
        say(f"{reference['name']}: perplexity {reference['perplexity']:.3f}")

    blocks = decoder_blocks(dense)
    chosen = targets(dense, blocks, ())
    with calibrating(dense):
        first = record(dense, blocks, samples, device)
        shares, weights = outlier_shares(LoadedBlocks(dense, blocks, chosen, device), OUTLIER_FACTOR, first)
    rows = []
    for method in args.methods:
        for allocation in ("uniform", "owl"):
            for sparsity in args.sparsities:
                recipe = Recipe.of(method=method, sparsity=sparsity, allocation=allocation)
                owl = allocation == "owl"
                planned = owl_sparsities(shares, weights, sparsity) if owl else [sparsity] * len(shares)
                model = copy.deepcopy(dense)
                start = time.perf_counter()
                with calibrating(model):
                    inner = decoder_blocks(model)
                    # Magnitude needs no text: the allocation is all that calibration gives it.
                    inputs = None if method == "magnitude" else record(model, inner, samples, device)
                    reports = prune_blocks(LoadedBlocks(model, inner, chosen, device), recipe, planned, inputs)
                synchronize(device)
                rows.append(
                    {
                        "method": method,
                        "allocation": allocation,
                        "sparsity": sparsity,
                        "zeros": sum(r.zeros for r in reports) / sum(r.weights for r in reports),
                        "bits_per_weight": encoded_bits(model),
                        "perplexity": evaluate(model),
                        "seconds": time.perf_counter() - start,
                        "block_sparsities": planned,
                        "block_errors": [r.error for r in reports],
                    }
                )
                say(f"{method} {allocation} {sparsity:.0%}: perplexity {rows[-1]['perplexity']:.3f}")
    return {**result, "seconds": time.perf_counter() - began, "references": references, "rows": rows}


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity against bits a weight."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "spinfer"  # the same file from the same data
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colours = dict(zip(METHODS, ("tab:gray", "tab:orange", "tab:blue"), strict=True))
    for method in METHODS:
        for allocation, style in (("uniform", "o-"), ("owl", "s--")):
            rows = [r for r in result["rows"] if (r["method"], r["allocation"]) == (method, allocation)]
            axes.plot(
                [r["bits_per_weight"] for r in rows],
                [r["perplexity"] for r in rows],
                style,
                color=colours[method],
                markersize=4,
                label=f"{method}, {allocation}",
            )
    for reference, marker in zip(result["references"], ("*", "D", "v"), strict=True):
        point = (reference["bits_per_weight"], reference["perplexity"])
        axes.plot(*point, marker, color="black", linestyle="none", label=reference["name"])
    axes.set(
        xlabel="bits a weight of the pruned matrices",
        ylabel="perplexity (log scale)",
        yscale="log",
        ylim=(0.9 * result["references"][0]["perplexity"], 20 * result["references"][0]["perplexity"]),
        title=f"{result['model']}, {result['evaluated_tokens']:,} tokens of held-out text",
    )
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def large_model(blocks: int, device: torch.device) -> PreTrainedModel:
    """Some blocks of Llama-3-8B's shape in bf16, random, in RAM."""
    config = LlamaConfig(**LLAMA_8B, num_hidden_layers=blocks)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        elif "lm_head" not in name:  # pruning never reads it
            parameter.data = (0.02 * torch.randn(parameter.shape, device=device, dtype=torch.bfloat16)).cpu()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def large(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of pruning an 8-billion-weight shape."""
    device = torch.device(args.device)
    model = large_model(args.blocks, device)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, LLAMA_8B["vocab_size"], (args.num_samples, args.sequence_length), generator=generator)
    seconds: list[float] = []

    def progress(done: int, total: int, report: BlockReport) -> None:
        seconds.append(report.seconds)
        say(f"block {done}/{total}: {report.seconds:.2f} s, error {report.error:.4f}")

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    report = spinfer.prune(model, samples, method=args.method, sparsity=args.sparsity, device=device, progress=progress)
    synchronize(device)
    steady = seconds[1:] or seconds
    found = {
        "model": f"{args.blocks} of the {LLAMA_8B_BLOCKS} blocks of Llama-3-8B's shape, random bf16 weights",
        **environment(device),
        "method": args.method,
        "sparsity": report.sparsity,
        "num_samples": args.num_samples,
        "sequence_length": args.sequence_length,
        "blocks": args.blocks,
        "weights_per_block": report.weights // args.blocks,
        "seconds": time.perf_counter() - began,
        "block_seconds": seconds,
        "seconds_for_all_blocks_estimated": LLAMA_8B_BLOCKS * sum(steady) / len(steady),
    }
    if device.type == "cuda":
        found["peak_gpu_allocated_nbytes"] = torch.cuda.max_memory_allocated(device)
        found["peak_gpu_reserved_nbytes"] = torch.cuda.max_memory_reserved(device)
    return found


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """`spinfer prune` as a process: wall time and the most memory that it held."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "spinfer", "prune", args.model, "-o", Path(folder, "out"), "--json"]
        command += ["--method", args.method, "--sparsity", args.sparsity, "--calibration", args.calibration]
        command += ["--num-samples", args.num_samples, "--sequence-length", args.sequence_length]
        command += ["--device", args.device, "--threads", args.threads]
        found = {"model": args.name, **environment(torch.device(args.device)), "threads": args.threads}
        began = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        if status:
            raise SystemExit("spinfer prune failed")
        report = json.loads(output)
    return {
        **found,
        "method": args.method,
        "sparsity": report["sparsity_reached"],
        "num_samples": args.num_samples,
        "sequence_length": args.sequence_length,
        "seconds": time.perf_counter() - began,
        "user_seconds": usage.ru_utime,
        "peak_resident_nbytes": usage.ru_maxrss * 1024,
        "block_seconds": [block["seconds"] for block in report["blocks"]],
        "block_errors": report["block_errors"],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("plot").add_argument("results", type=Path)
    for verb in ("grid", "large", "speed"):
        one = verbs.add_parser(verb)
        one.add_argument("--out", type=Path, help="JSON file; standard output where absent")
        one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        one.add_argument("--num-samples", type=int, default=128)
        one.add_argument("--sequence-length", type=int, default=2048 if verb == "large" else 1024)
        if verb != "large":
            one.add_argument("--model", type=Path, help="a dense model directory; the demo's where absent")
            one.add_argument("--calibration", type=Path)
            one.add_argument("--evaluation", type=Path)
            one.add_argument("--name", default="SmolLM2-135M-Instruct")
        if verb == "grid":
            one.add_argument("--seed", type=int, default=0)
            one.add_argument("--eval-tokens", type=int, default=65_536)
            one.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
            one.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
        else:
            one.add_argument("--method", choices=METHODS[1:], default="sparsegpt")
            one.add_argument("--sparsity", type=float, default=0.5)
        if verb == "large":
            one.add_argument("--blocks", type=int, default=LLAMA_8B_BLOCKS)
        if verb == "speed":
            one.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.verb in ("grid", "speed") and not (
        args.model and args.calibration and (args.evaluation or args.verb == "speed")
    ):
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
        from fetch import fetch_model, fetch_text

        folder = Path(".demo")
        folder.mkdir(exist_ok=True)
        args.model = args.model or fetch_model(folder)
        calibration, evaluation = fetch_text(folder)
        args.calibration, args.evaluation = args.calibration or calibration, args.evaluation or evaluation
    return args


def main() -> None:
    """Command line."""
    args = _arguments()
    if args.verb == "plot":
        plot(json.loads(args.results.read_text()), args.results.with_suffix(".svg"))
        return
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"grid": grid, "large": large, "speed": speed}[args.verb](args)
    text = json.dumps(result, indent=1) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
