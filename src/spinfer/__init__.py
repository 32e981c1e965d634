"""Unstructured-sparse large language models, smaller and faster to run.

Importing compiles nothing and does not touch CUDA. It registers the op, and tells transformers about compressed
checkpoints, in either import order.
"""

from typing import Any

from spinfer.errors import SpinferError
from spinfer.format import TcaBmeTensor, encode
from spinfer.integrations.import_hook import after_import
from spinfer.kernels import pack
from spinfer.linear import SparseLinear
from spinfer.ops import linear

__version__ = "0.1.0"

__all__ = ["SparseLinear", "SpinferError", "TcaBmeTensor", "compress_model", "encode", "linear", "pack", "prune"]


def _register_with_transformers() -> None:
    import spinfer.integrations.transformers.quantizer  # noqa: F401


after_import("transformers.modeling_utils", _register_with_transformers)


def __getattr__(name: str) -> Any:
    if name == "compress_model":  # needs transformers, which takes seconds to import
        from spinfer.integrations.transformers.quantizer import compress_model

        return compress_model
    if name == "prune":
        from spinfer.integrations.transformers.pruning import prune

        return prune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
