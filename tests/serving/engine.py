"""Run vLLM on a model in a process of its own: a job as JSON on stdin, its result as a marked line of stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "0",
}
"""Several workers on a few cores: none may wait by spinning."""

_MARK = "RESULT "


def serving_environment() -> dict[str, str]:
    """Environment of a process that runs vLLM."""
    return os.environ | SETTINGS


def vllm_generate(
    model: Path, prompts: list[str], *, max_tokens: int = 24, adapter: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Greedy tokens of each prompt, the bytes of each rank's weights, and of `memory.Weighed` workers what they grew.

    Args:
        model: a model directory.
        prompts: as text.
        max_tokens: after each.
        adapter: a LoRA adapter's directory.
        options: for `vllm.LLM`.

    Raises:
        RuntimeError: vLLM stopped; the message is its output.
    """
    job = {"model": str(model), "prompts": prompts, "max_tokens": max_tokens, "options": options}
    if adapter is not None:
        job |= {"adapter": str(adapter), "options": options | {"enable_lora": True, "max_lora_rank": 8}}
    return _run(job)


def vllm_differences(
    model: Path, prompts: list[list[int]], expected: list[list[int]], **options: Any
) -> list[tuple[int, int, int]]:
    """Where greedy tokens differ from the expected ones: prompt, position, and what vLLM chose there.

    After a difference it goes on from the expected token, so that every token is compared.

    Args:
        model: a model directory.
        prompts: token ids.
        expected: the tokens after each prompt.
        options: for `vllm.LLM`.
    """
    result = _run({"model": str(model), "prompts": prompts, "expected": expected, "options": options})
    return [(prompt, position, token) for prompt, position, token in result["differences"]]


def _run(job: dict[str, Any]) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job),
        env=serving_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(child.stdout + child.stderr)
    line = next(line for line in child.stdout.splitlines() if line.startswith(_MARK))
    result: dict[str, Any] = json.loads(line.removeprefix(_MARK))
    return result


def _weights_nbytes(worker: Any) -> int:
    return sum(parameter.nbytes for parameter in worker.model_runner.model.parameters())


def _greedy(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def _differences(llm: Any, prompts: list[list[int]], expected: list[list[int]]) -> list[tuple[int, int, int]]:
    found = []
    begins = dict.fromkeys(range(len(prompts)), 0)
    while begins:
        inputs = [{"prompt_token_ids": prompts[number] + expected[number][:at]} for number, at in begins.items()]
        sampling = [_greedy(len(expected[number]) - at) for number, at in begins.items()]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        again = {}
        for (number, at), output in zip(begins.items(), outputs, strict=True):
            chosen, wanted = list(output.outputs[0].token_ids), expected[number][at:]
            difference = next((i for i in range(len(wanted)) if chosen[i] != wanted[i]), None)
            if difference is not None:
                found.append((number, at + difference, chosen[difference]))
                if difference + 1 < len(wanted):
                    again[number] = at + difference + 1
        begins = again
    return found


def main() -> None:
    """The child."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    job = json.load(sys.stdin)
    llm = LLM(model=job["model"], max_model_len=128, max_num_seqs=4, gpu_memory_utilization=0.2, **job["options"])
    result: dict[str, Any] = {"weights_nbytes": llm.collective_rpc(_weights_nbytes)}
    if "expected" in job:
        result["differences"] = _differences(llm, job["prompts"], job["expected"])
    else:
        lora = LoRARequest("adapter", 1, job["adapter"]) if "adapter" in job else None
        outputs = llm.generate(job["prompts"], _greedy(job["max_tokens"]), use_tqdm=False, lora_request=lora)
        result["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    if job["options"].get("worker_cls") == "memory.Weighed":
        result["grown_nbytes"] = llm.collective_rpc("grown_nbytes")
    print("\n" + _MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
