"""Kernels behind one op: the backends in order of preference, and how a weight finds its own."""

from __future__ import annotations

from spinfer.errors import SpinferError
from spinfer.format import TcaBmeTensor
from spinfer.kernels.cpu import CpuBackend
from spinfer.kernels.cuda import CudaBackend
from spinfer.kernels.packed import Backend, PackedWeight
from spinfer.kernels.tilewise import TilewiseBackend

CPU = CpuBackend()
CUDA = CudaBackend()
TILEWISE = TilewiseBackend()

BACKENDS: tuple[Backend, ...] = (CUDA, CPU, TILEWISE)
"""First match wins; the last accepts everything."""


def backend_of(layout: str) -> Backend:
    """The backend that reads a layout.

    Raises:
        SpinferError: no backend of that name in this version.
    """
    for backend in BACKENDS:
        if backend.layout == layout:
            return backend
    raise SpinferError(f"no kernel reads the layout {layout!r}")


def pack(weight: TcaBmeTensor, *, validated: bool = False) -> PackedWeight:
    """The weight in the layout of the fastest backend that accepts it where it is.

    Args:
        weight: to pack.
        validated: it has passed `validate`, or was cut and joined from weights that have.

    Raises:
        FormatError: the weight's parts disagree. Kernels trust them, so everything they read has been validated.
    """
    if not validated:
        weight.validate()
    return next(backend for backend in BACKENDS if backend.accepts(weight)).pack(weight)


def unpack(packed: PackedWeight) -> TcaBmeTensor:
    """Back to the storage layout, bit-exact."""
    return backend_of(packed.layout).unpack(packed)


def prepare(packed: PackedWeight) -> None:
    """Begin to compile, in the background, what calls with this weight may need, and return.

    For models that are going to run: on a GPU each kind of kernel is compiled once a machine, and its first call waits.
    With `SPINFER_AUTOTUNE=1` first measures which kernels are the fastest for this kind of weight, once a machine.
    """
    if packed.layout == CUDA.layout:
        CUDA.prepare(packed)


__all__ = [
    "BACKENDS",
    "CPU",
    "CUDA",
    "TILEWISE",
    "Backend",
    "PackedWeight",
    "backend_of",
    "pack",
    "prepare",
    "unpack",
]
