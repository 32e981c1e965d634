"""A compressed model in transformers on one GPU or several: `torchrun --nproc-per-node 2 tensor_parallel.py DIR OUT`.

Run it with one process and with more; `--logits FILE` keeps the logits of the first run, to compare later ones with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import spinfer
from spinfer.kernels.cuda.ahead import COMPILER


def timed(model: Any, batch: int, length: int, new_tokens: int) -> float:
    """Seconds of one greedy generation of random prompts."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(10, model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    _wait()
    began = time.perf_counter()
    output = model.generate(prompts, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    _wait()
    assert output.shape == (batch, length + new_tokens)
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def main() -> None:
    """Measure; the first rank writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--commit", required=True, help="of the code")
    arguments = parser.parse_args()

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = (
        {"distributed_config": DistributedConfig(tp_plan="auto")} if ranks > 1 else {"device_map": device}
    )
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.directory, dtype=getattr(torch, arguments.dtype), **options
    ).eval()
    loaded_s = time.perf_counter() - began
    first = ranks == 1 or dist.get_rank() == 0
    sparse = [module for module in model.modules() if isinstance(module, spinfer.SparseLinear)]
    result: dict[str, Any] = {
        "model": arguments.directory.name,
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "ranks": ranks,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": arguments.commit,
        "date": time.strftime("%Y-%m-%d"),
        "load_s": round(loaded_s, 1),
        "sparse_gib_a_rank": round(sum(module.weight_nbytes for module in sparse) / 2**30, 3),
        "rows": [],
    }
    if device == "cuda":
        result["allocated_gib_a_rank"] = round(torch.cuda.memory_allocated() / 2**30, 3)

    tokens = torch.arange(10, 74, device=model.device).view(1, -1)
    logits = model(tokens).logits.float().cpu()
    if first and arguments.logits is not None:
        if arguments.logits.exists():
            before = torch.load(arguments.logits)
            result["largest_logit_difference"] = float((logits - before).abs().max())
            result["largest_logit"] = float(before.abs().max())
            result["same_best_token"] = float((logits.argmax(-1) == before.argmax(-1)).float().mean())
        else:
            torch.save(logits, arguments.logits)

    COMPILER.wait()
    for batch in arguments.batches:
        timed(model, batch, arguments.input, arguments.new_tokens)  # attention plans for each new length
        one = statistics.median(timed(model, batch, arguments.input, 1) for _ in range(arguments.repeats))
        whole = statistics.median(
            timed(model, batch, arguments.input, arguments.new_tokens) for _ in range(arguments.repeats)
        )
        step = (whole - one) / (arguments.new_tokens - 1)
        result["rows"].append(
            {"batch": batch, "decode_ms": round(step * 1e3, 3), "decode_tokens_per_s": round(batch / step, 1)}
        )
    if first:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
