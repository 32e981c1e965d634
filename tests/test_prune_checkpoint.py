"""`spinfer prune`: from directory to directory, with little memory, and going on after an interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import spinfer
from checkpoint_models import load_directory
from command_line import as_json, error_of, run, succeed
from conftest import save_with_tokenizer
from spinfer.checkpoint import CompressedCheckpoint
from spinfer.errors import CheckpointError, OutputError, SpinferError
from spinfer.integrations.transformers.prune_checkpoint import prune_checkpoint
from spinfer.pruning import Recipe, read_texts, sample_tokens
from spinfer.pruning.report import BlockReport
from test_checkpoint_output import file_size_limit
from test_pruning_model import build, mixture

SIZES: dict[str, Any] = {"num_samples": 6, "sequence_length": 24}
OPTIONS = ("--num-samples", "6", "--sequence-length", "24", "--device", "cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30, encoding="utf-8")
    return path


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_with_tokenizer(build("llama", torch.bfloat16), tmp_path / "dense")


def prune(dense: Path, output: Path, text: Path | None, recipe: Recipe | None = None, **options: Any) -> Any:
    return prune_checkpoint(dense, output, recipe or Recipe.of(), calibration=text, **{**SIZES, **options})


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "gemma2", "qwen3", "phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_as_in_memory(architecture: str, dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    dense = save_with_tokenizer(build(architecture, dtype), tmp_path / "dense")
    recipe = Recipe.of(allocation="owl", sparsity=0.6)
    streamed = prune(dense, tmp_path / "out", text, recipe)

    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    samples = sample_tokens(read_texts(text), lambda content: tokenizer(content)["input_ids"], **SIZES)
    loaded = spinfer.prune(model, samples, sparsity=0.6, allocation="owl")
    assert [block.error for block in streamed.blocks] == [block.error for block in loaded.blocks]
    assert streamed.calibration is not None
    assert loaded.calibration is not None
    assert streamed.calibration["samples_sha256"] == loaded.calibration["samples_sha256"]
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(reopened.state_dict()[name], tensor), name
    assert reopened.config.spinfer_pruning["allocation"] == "owl"


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_masks_leave_every_other_bit(method: str, dense: Path, text: Path, tmp_path: Path) -> None:
    (dense / "README.md").write_text("---\nlicense: mit\n---\n# Original\n")
    (dense / "LICENSE").write_text("MIT")
    succeed("prune", dense, "-o", tmp_path / "out", "--method", method, "-s", "0.4", "--calibration", text, *OPTIONS)
    before, after = load_directory(dense), load_directory(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        kept = tensor != 0
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor[kept], before[name][kept])
        if "proj" in name:
            assert float((~kept).float().mean()) == pytest.approx(0.4, abs=0.01)
        else:
            assert torch.equal(tensor, before[name])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# dense, pruned with spinfer")
    assert "# Original" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((dense / "config.json").read_text())
    assert config.pop("spinfer_pruning")["method"] == method
    assert config == original
    assert not list(tmp_path.glob(".out*"))


def test_what_the_user_sees(dense: Path, text: Path, tmp_path: Path) -> None:
    done = run("prune", dense, "-o", tmp_path / "out", "--calibration", text, *OPTIONS)
    assert done.returncode == 0, done.stderr
    for block in (1, 2):
        assert f"block {block}/2: 50.00% zeros, error 0." in done.stderr
    assert "s left" in done.stderr
    assert "left dense: lm_head: output embedding" in done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: 50.00% zeros in ")
    report = as_json("prune", dense, "-o", tmp_path / "again", "--calibration", text, *OPTIONS, "--json")
    assert report["sparsity_reached"] == 0.5
    assert report["blocks"][1]["matrices"][0]["tokens"] == 6 * 24


def test_compressed_at_once(dense: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", text, "-s", "0.7", *OPTIONS)
    succeed("prune", dense, "-o", tmp_path / "pruned", *arguments)
    succeed("prune", dense, "-o", tmp_path / "compressed", *arguments, "--compress")
    pruned = load_directory(tmp_path / "pruned")
    for name, weight in CompressedCheckpoint(tmp_path / "compressed").load_all():
        assert torch.equal(weight.decode(), pruned[f"{name}.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", dtype="auto")
    assert model.config.spinfer_pruning["sparsity"] == 0.7
    card = (tmp_path / "compressed" / "README.original.md").read_text()
    assert "dense, pruned with spinfer" in card
    assert "dense-pruned, compressed with spinfer" in (tmp_path / "compressed" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compressed", "dense", "pruned", "text.txt"]


def test_sharded_in_and_out(dense: Path, text: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "sharded")
    prune(tmp_path / "sharded", tmp_path / "many", text, max_shard_nbytes=80_000)
    prune(dense, tmp_path / "one", text)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    many, one = load_directory(tmp_path / "many"), load_directory(tmp_path / "one")
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)


def test_bin_files_with_tied_weights(text: Path, tmp_path: Path) -> None:
    """Their tied embedding is one tensor in the result, and the same one."""
    dense = save_with_tokenizer(build("qwen2", torch.float32), tmp_path / "dense")
    state = load_file(dense / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    prune(dense, tmp_path / "out", text)
    result = load_directory(tmp_path / "out")
    assert "lm_head.weight" not in result
    assert torch.equal(result["model.embed_tokens.weight"], state["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_of_several_types_are_written_back_as_they_came(dense: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = load_file(dense / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].float() + 1e-4
    state["model.norm.weight"] = state["model.norm.weight"].float()
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    prune(dense, tmp_path / "out", text, Recipe.of(method="wanda"))
    result = load_directory(tmp_path / "out")
    for name, tensor in result.items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor[tensor != 0], state[name][tensor != 0]), name


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("recipe", [Recipe.of(), Recipe.of(allocation="owl", method="wanda")])
def test_goes_on_at_a_block_boundary(recipe: Recipe, dense: Path, text: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "whole", text, recipe)

    def interrupt(done: int, total: int, report: BlockReport) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        prune(dense, tmp_path / "out", text, recipe, progress=interrupt)
    assert not (tmp_path / "out").exists()
    resumed: list[tuple[int, int]] = []
    seen: list[int] = []
    prune(
        dense,
        tmp_path / "out",
        text,
        recipe,
        on_resume=lambda done, total: resumed.append((done, total)),
        on_plan=lambda done, total: seen.append(done),
    )
    assert resumed == [(1, 2)]
    assert not seen  # what OWL found is kept too
    whole, out = load_directory(tmp_path / "whole"), load_directory(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)
    assert not (tmp_path / ".out.work").exists()


def test_another_recipe_does_not_go_on_with_it(dense: Path, text: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, report: BlockReport) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        prune(dense, tmp_path / "out", text, progress=interrupt)
    for changed, options in (
        ("recipe", {"recipe": Recipe.of(sparsity=0.6)}),
        ("samples", {"seed": 1}),
        ("ignore", {"ignore": ["*.down_proj"]}),
    ):
        with pytest.raises(CheckpointError, match=rf"another run \({changed} differ\).*remove the directory"):
            prune(dense, tmp_path / "out", text, **options)
    file = dense / "model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"\(model differ\)"):
        prune(dense, tmp_path / "out", text)
    shutil.rmtree(tmp_path / ".out.work")
    prune(dense, tmp_path / "out", text)


KILLED = """
import sys, time
from spinfer.integrations.transformers.prune_checkpoint import prune_checkpoint
from spinfer.pruning import Recipe

def progress(done, total, report):
    print(done, flush=True)
    time.sleep(60)

prune_checkpoint(sys.argv[1], sys.argv[2], Recipe.of(), calibration=sys.argv[3], num_samples=6, sequence_length=24,
                 progress=progress)
"""


def test_killed_and_taken_up(dense: Path, text: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED, str(dense), str(tmp_path / "out"), str(text)]
    killed = subprocess.Popen(arguments, stdout=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"1\n"
    with pytest.raises(OutputError, match="being written by another run"):
        prune(dense, tmp_path / "out", text)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = run("prune", dense, "-o", tmp_path / "out", "--calibration", text, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "going on after 1 of 2 blocks" in done.stderr


def test_a_full_disk_loses_no_finished_block(dense: Path, text: Path, tmp_path: Path) -> None:
    blocks = tmp_path / ".out.work"
    with file_size_limit(1000), pytest.raises(OutputError, match=r"cannot be written.*free space"):
        prune(dense, tmp_path / "out", text)  # no block fits
    assert [path.name for path in sorted(blocks.iterdir())] == ["sparsities.json", "task.json"]
    nearly_all = (dense / "model.safetensors").stat().st_size - 1000
    with pytest.raises(OutputError, match="cannot be written"), file_size_limit(nearly_all):
        prune(dense, tmp_path / "out", text)  # both blocks fit, the model does not
    assert not (tmp_path / "out").exists()
    assert len(list(blocks.glob("part-*.safetensors"))) == 2
    resumed: list[int] = []
    prune(dense, tmp_path / "out", text, on_resume=lambda done, total: resumed.append(done))
    assert resumed == [2]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_damaged_part_is_named(dense: Path, text: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, report: BlockReport) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        prune(dense, tmp_path / "out", text, progress=interrupt)
    part = tmp_path / ".out.work" / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"part-00000\.safetensors is damaged"):
        prune(dense, tmp_path / "out", text)


def test_output_that_exists_is_kept(dense: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep")
    assert "exists already" in error_of("prune", dense, "-o", tmp_path / "out", "--calibration", text, *OPTIONS)
    assert (tmp_path / "out" / "notes.txt").read_text() == "keep"
    assert not (tmp_path / ".out.work").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.0"], "0 <= sparsity < 1"),
        (["--sparsity", "-0.1"], "0 <= sparsity < 1"),
        (["--pattern", "4:2"], "N:M"),
        (["--pattern", "2:4", "--sparsity", "0.7"], "leave one out"),
        (["--pattern", "2:4", "--allocation", "owl"], "--allocation uniform"),
        (["--pattern", "2:7"], "no multiple of 7"),
        (["--sequence-length", "500"], "longer than the model's limit"),
        (["--ignore", "*.typo"], "matches no Linear"),
        (["--ignore", "*"], "nothing to prune"),
    ],
)
def test_bad_options(arguments: list[str], message: str, dense: Path, text: Path, tmp_path: Path) -> None:
    assert message in error_of("prune", dense, "-o", tmp_path / "out", "--calibration", text, *OPTIONS, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "it is empty"), (b"only this", "too short"), (b"\xff\xfe\x00\x80", "UTF-8"), (b"a\x00b" * 99, "NUL")],
)
def test_bad_calibration_text(content: bytes, message: str, dense: Path, text: Path, tmp_path: Path) -> None:
    text.write_bytes(content)
    assert message in error_of("prune", dense, "-o", tmp_path / "out", "--calibration", text, *OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]


def test_calibration_that_is_needed_or_missing(dense: Path, tmp_path: Path) -> None:
    assert "needs calibration text" in error_of("prune", dense, "-o", tmp_path / "out", *OPTIONS)
    missing = tmp_path / "nowhere.txt"
    assert "nowhere.txt" in error_of("prune", dense, "-o", tmp_path / "out", "--calibration", missing, *OPTIONS)
    succeed("prune", dense, "-o", tmp_path / "out", "--method", "magnitude", *OPTIONS)


def test_a_pruned_model_is_said_to_be_one(dense: Path, text: Path, tmp_path: Path) -> None:
    succeed("prune", dense, "-o", tmp_path / "once", "--method", "magnitude", "-s", "0.4", *OPTIONS)
    done = run("prune", tmp_path / "once", "-o", tmp_path / "twice", "-s", "0.6", "--calibration", text, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "zeros already (40.00%); they are kept" in done.stderr.replace("39.99", "40.00")
    once, twice = load_directory(tmp_path / "once"), load_directory(tmp_path / "twice")
    for name, tensor in once.items():
        if "proj" in name:
            assert (twice[name][tensor == 0] == 0).all()
            assert float((twice[name] == 0).float().mean()) == pytest.approx(0.6, abs=0.01)


def test_mixtures_of_experts_are_sent_to_memory(text: Path, tmp_path: Path) -> None:
    """On disk each expert is tensors of its own; transformers stacks them when it loads the model."""
    dense = save_with_tokenizer(mixture(), tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"experts.*spinfer\.prune\(model, samples\)"):
        prune(dense, tmp_path / "out", text)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    samples = torch.randint(3, 250, (6, 24))
    report = spinfer.prune(model, samples, sparsity=0.5)
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    experts = reloaded.model.layers[0].mlp.experts.gate_up_proj
    assert float((experts == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_a_compressed_directory_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    succeed("prune", dense, "-o", tmp_path / "out", "--method", "magnitude", "-s", "0.7", "--compress", *OPTIONS)
    assert "compressed already" in error_of("prune", tmp_path / "out", "-o", tmp_path / "x", "--method", "magnitude")


def test_weights_of_another_model(dense: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "intermediate_size": 208}))
    with pytest.raises(CheckpointError, match=r"config\.json and weights are of different models"):
        prune(dense, tmp_path / "out", text)


def test_outputs_that_overflow_half_precision(text: Path, tmp_path: Path) -> None:
    model = build("llama", torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.fill_(6e4)
            layer.mlp.up_proj.weight.fill_(6e2)
    dense = save_with_tokenizer(model, tmp_path / "dense")
    with pytest.raises(SpinferError, match=r"NaN or infinity|not finite"):
        prune(dense, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


MEASURED = """
import sys
from spinfer.integrations.transformers.prune_checkpoint import prune_checkpoint
from spinfer.pruning import Recipe
prune_checkpoint(sys.argv[1], sys.argv[2], Recipe.of(method="magnitude"))
status = open("/proc/self/status").read()
print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)  # ru_maxrss would count what the parent held when it forked
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_holds_a_block_and_not_the_model(tmp_path: Path) -> None:
    """Blocks of 20 MB each: six more of them take less than one more."""
    peaks = {}
    for blocks in (2, 8):
        config = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": blocks, "head_dim": 64}
        dense = save_with_tokenizer(build("mistral", torch.bfloat16, **config), tmp_path / f"dense{blocks}")
        command = [sys.executable, "-c", MEASURED, str(dense), str(tmp_path / f"out{blocks}")]
        # Freed arrays go back at once, so that the peak is what is held and not what the allocator keeps by chance.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[blocks] = int(done.stdout)
    per_block = sum(t.nbytes for name, t in load_directory(dense).items() if ".layers.0." in name)
    assert per_block > 20e6
    assert peaks[8] - peaks[2] < per_block
