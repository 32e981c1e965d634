"""Unstructured-sparse large language models, smaller and faster to run.

Importing compiles nothing and does not touch CUDA; it registers the op and the quantisation method that lets
`transformers` load compressed checkpoints.
"""

from spinfer.errors import SpinferError
from spinfer.format import TcaBmeTensor, encode
from spinfer.kernels import pack
from spinfer.linear import SparseLinear
from spinfer.ops import linear

__version__ = "0.1.0"

__all__ = ["SparseLinear", "SpinferError", "TcaBmeTensor", "encode", "linear", "pack"]
