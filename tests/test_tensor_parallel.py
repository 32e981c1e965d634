"""Tensor parallelism in transformers: two processes that talk over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import spinfer
from conftest import pruned_model

RANK = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import spinfer

torch.set_num_threads(1)
try:
    plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, distributed_config=plan).eval()
    tokens = torch.tensor(json.loads(sys.argv[2]))
    with torch.no_grad():
        logits = model(tokens).logits
    generated = model.generate(tokens, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    sparse = [module for module in model.modules() if isinstance(module, spinfer.SparseLinear)]
    result = {
        "logits": logits.tolist(),
        "generated": generated.tolist(),
        "nnz": sum(module.nnz for module in sparse),
        "packed": all(module.is_packed for module in sparse),
    }
    try:
        model.save_pretrained(sys.argv[3])
    except spinfer.SpinferError as error:
        result["save"] = str(error)
except spinfer.SpinferError as error:
    result = {"error": str(error)}
path = f"{sys.argv[3]}/rank{dist.get_rank()}.json"
with open(path, "w") as file:
    json.dump(result, file)
"""


def on_two_ranks(model: Path, tokens: torch.Tensor, folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(model), json.dumps(tokens.tolist()), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def saved(architecture: str, folder: Path) -> Path:
    """A compressed model on disk."""
    model = pruned_model(architecture, dtype=torch.float32)
    spinfer.compress_model(model)
    model.save_pretrained(folder)
    return folder


def test_two_ranks_compute_what_one_does(tmp_path: Path, tokens: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    folder = saved("wide", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens).logits
    generated = model.generate(tokens, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    nnz = sum(module.nnz for module in model.modules() if isinstance(module, spinfer.SparseLinear))
    ranks = on_two_ranks(folder, tokens, tmp_path)
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["logits"]), logits, rtol=1e-4, atol=1e-4)
        assert rank["generated"] == generated.tolist()
        assert rank["packed"]
        assert "load the model in one process" in rank["save"]
    assert [rank["nnz"] for rank in ranks] != [nnz, nnz]
    assert sum(rank["nnz"] for rank in ranks) == nnz


def test_a_size_that_cuts_tiles_is_refused_on_every_rank(tmp_path: Path, tokens: torch.Tensor) -> None:
    ranks = on_two_ranks(saved("llama", tmp_path / "model"), tokens, tmp_path)
    assert ranks[0] == ranks[1]
    assert "tensor-parallel size 2 cuts" in ranks[0]["error"]
