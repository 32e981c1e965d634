"""`CudaBackend`: accepts a weight on a capable GPU, repacks it, and picks a kernel for each call."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spinfer import env
from spinfer.format import TcaBmeTensor
from spinfer.kernels.cuda.layout import LAYOUT, ChunkGrid, has_dense_copy, ranges_in
from spinfer.kernels.cuda.select import Dense, choose, in_eights
from spinfer.kernels.packed import PackedWeight, WeightSpec, tokens_and_stride

if TYPE_CHECKING:
    from spinfer.kernels.cuda.passes import Run

_VALUE_DTYPES = (torch.float16, torch.bfloat16)
_OLDEST = (8, 0)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache
def _missing() -> str | None:
    """What keeps kernels from being compiled here, or None."""
    try:
        found = importlib.util.find_spec("cuda.core") and importlib.util.find_spec("cuda.bindings.nvrtc")
    except ImportError:
        found = None
    return None if found else "cuda-core is not installed (pip install 'spinfer[cuda]')"


class CudaBackend:
    """Kernels compiled at run time for the GPU that holds the weight."""

    layout = LAYOUT

    def accepts(self, weight: TcaBmeTensor) -> bool:
        """16-bit values on a GPU of compute capability 8.0 or newer; says once why a GPU's weight is left out."""
        if weight.device.type != "cuda" or weight.dtype not in _VALUE_DTYPES:
            return False
        capability = torch.cuda.get_device_capability(weight.device)
        reason = (
            f"compute capability {capability[0]}.{capability[1]} is older than 8.0"
            if capability < _OLDEST
            else _missing()
        )
        if reason is not None:
            _warn_once(f"sparse layers on {weight.device} run on the slower portable path: {reason}")
        return reason is None

    def pack(self, weight: TcaBmeTensor) -> PackedWeight:
        """Repack on the GPU, losslessly; with a dense copy beside it as far as the environment wants some."""
        from spinfer.kernels.cuda.copies import DENSE_COPIES
        from spinfer.kernels.cuda.repack import pack_chunks

        parts = DENSE_COPIES.add(pack_chunks(weight), weight.shape, weight.dtype)
        return PackedWeight(WeightSpec(LAYOUT, weight.shape, weight.nnz, weight.dtype), parts)

    def prepare(self, packed: PackedWeight) -> None:
        """See `spinfer.kernels.prepare`."""
        from spinfer.kernels.cuda.tune import Kind, tune

        spec, parts = packed.spec, packed.parts
        index = packed.device.index
        key = (spec.shape, spec.rounded_nnz, spec.dtype, ranges_in(parts), index, has_dense_copy(parts))
        if env.autotune() and tune(Kind.of(*key), parts):
            _run.cache_clear()
        _compile_ahead(*key)

    def unpack(self, packed: PackedWeight) -> TcaBmeTensor:
        """The inverse of `pack`, bit-exact."""
        from spinfer.kernels.cuda.repack import unpack_chunks

        chunks, offsets = packed.parts[:2]
        return unpack_chunks(chunks, offsets, packed.shape, packed.nnz, packed.dtype)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """See `Backend.linear`.

        x of another dtype than the values takes the decoded path: values are converted to x's dtype, never x to theirs.
        """
        index = x.device.index
        if index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                return self.linear(x, packed, bias)
        tokens, stride = tokens_and_stride(x)
        spec, parts = packed.spec, packed.parts
        ranges, dense = ranges_in(parts), has_dense_copy(parts)
        run = _run(spec.shape, spec.rounded_nnz, in_eights(tokens), x.dtype, spec.dtype, index, ranges, dense)
        if run is None:
            return torch.nn.functional.linear(x, parts[-1], bias)
        y = x.new_empty((*x.shape[:-1], spec.shape[0]))
        run(x, tokens, stride, parts, bias, y)
        return y


@functools.lru_cache(maxsize=4096)
def _compile_ahead(shape: tuple[int, int], nnz: int, dtype: torch.dtype, ranges: int, index: int, dense: bool) -> None:
    from spinfer.kernels.cuda.ahead import COMPILER
    from spinfer.kernels.cuda.runtime import device_traits
    from spinfer.kernels.cuda.sources import all_sources
    from spinfer.kernels.cuda.tune import Kind, tuned

    known = tuned(Kind.of(shape, nnz, dtype, ranges, index, dense))
    COMPILER.submit(all_sources(shape, nnz, dtype, device_traits(index), ranges, dense, known))


@functools.lru_cache(maxsize=4096)
def _run(
    shape: tuple[int, int],
    nnz: int,
    tokens: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    index: int,
    ranges: int,
    dense: bool,
) -> Run | None:
    """What to run for up to `tokens` rows of x and a weight with about `nnz` nonzeros; None to multiply with its copy.

    Making one takes several launches' time, and a server's prompts have ever other numbers of tokens: so the layers of
    a model that are alike share one, and 8 numbers of tokens do, between which the selection makes no difference.
    """
    from spinfer.kernels.cuda.passes import run_of
    from spinfer.kernels.cuda.runtime import device_traits
    from spinfer.kernels.cuda.tune import Kind, tuned

    if x_dtype != dtype:
        _warn_once(
            f"x is {x_dtype} but the sparse weight {dtype}: the fused kernels need one dtype, so the "
            "weight is decoded and multiplied densely. Convert x, or the layer, for full speed."
        )
    grid = ChunkGrid.of(*shape)
    known = tuned(Kind.of(shape, nnz, dtype, ranges, index, dense))
    plan = choose(grid, nnz, tokens, x_dtype == dtype, device_traits(index), ranges, dense, known)
    # One call of torch's takes the host less time than what `run_of` gives, which writes into a y that is there.
    return None if isinstance(plan, Dense) else run_of(plan, grid, dtype, torch.device("cuda", index))
