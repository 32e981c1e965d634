"""`CpuBackend`: packs weights into panels and runs them with the native library."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from spinfer.errors import SpinferError
from spinfer.format import Geometry, TcaBmeTensor
from spinfer.format.layout import OFFSET_UNIT
from spinfer.kernels.cpu.library import CpuLibrary, load
from spinfer.kernels.packed import PackedWeight, WeightSpec, tokens_and_stride

CPU_LAYOUT = "cpu_panels"
"""Parts: values, 1-D, in the panels' order, with spare bytes at the end; masks, int32 [panels * column pairs * 2];
offsets, int64 [panels + 1], in values. The order is specified in native/spinfer_cpu.h."""

_PANEL_ROWS = 32
_TAIL_NBYTES = 64
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class CpuBackend:
    """Runs weights on the CPU.

    Args:
        tier: instruction tier ("amx", "avx512bf16", "avx512", "avx2" or "scalar"); by default the library's choice.
    """

    layout = CPU_LAYOUT

    def __init__(self, tier: str | None = None) -> None:
        self._tier = tier

    def accepts(self, weight: TcaBmeTensor) -> bool:
        """Weights on the CPU, where the library was built."""
        return weight.device.type == "cpu" and load() is not None

    def pack(self, weight: TcaBmeTensor) -> PackedWeight:
        """Repack, a row of GroupTiles at a time, on torch's threads; never reads outside of the weight's arrays.

        Raises:
            FormatError: the parts disagree with each other.
        """
        library = _library()
        out_features, in_features = shape = weight.shape
        panels = -(-out_features // _PANEL_ROWS)
        values, bitmap, offsets = (part.contiguous() for part in (weight.values, weight.bitmap, weight.offsets))
        threads = torch.get_num_threads()
        starts = torch.empty(panels + 1, dtype=torch.int64)
        plan = library.native.spinfer_cpu_pack_plan(
            bitmap.data_ptr(), offsets.data_ptr(), values.numel(), weight.nnz, *shape, starts.data_ptr(), threads
        )
        library.check(plan, "this weight cannot be packed")
        masks = torch.empty(panels * -(-in_features // 2) * 2, dtype=torch.int32)
        packed = torch.empty(weight.nnz + _TAIL_NBYTES // weight.dtype.itemsize, dtype=weight.dtype)
        result = library.native.spinfer_cpu_pack(
            self._kernel[1],
            values.data_ptr(),
            bitmap.data_ptr(),
            offsets.data_ptr(),
            *shape,
            _TYPES[weight.dtype],
            starts.data_ptr(),
            packed.data_ptr(),
            masks.data_ptr(),
            threads,
        )
        library.check(result, "this weight cannot be packed")
        return PackedWeight(WeightSpec(self.layout, shape, weight.nnz, weight.dtype), (packed, masks, starts))

    def unpack(self, packed: PackedWeight) -> TcaBmeTensor:
        """The inverse of `pack`, bit-exact."""
        library = _library()
        geometry = Geometry(*packed.shape)
        threads = torch.get_num_threads()
        bitmap = torch.empty(geometry.bitmap_words, dtype=torch.int64)
        offsets = torch.empty(geometry.offsets_len, dtype=torch.int32)
        plan = library.native.spinfer_cpu_unpack_plan(
            packed.parts[1].data_ptr(),
            *packed.shape,
            _TYPES[packed.dtype],
            bitmap.data_ptr(),
            offsets.data_ptr(),
            threads,
        )
        library.check(plan, "this weight cannot be unpacked")
        values = torch.empty(int(offsets[-1]) * OFFSET_UNIT, dtype=packed.dtype)
        result = library.native.spinfer_cpu_unpack(
            *_pointers(packed), bitmap.data_ptr(), offsets.data_ptr(), values.data_ptr(), threads
        )
        library.check(result, "this weight cannot be unpacked")
        return TcaBmeTensor(values, bitmap, offsets, packed.shape, packed.nnz)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """See `Backend.linear`."""
        native_linear, tier = self._kernel
        values, masks, offsets = packed.parts
        out_features, in_features = packed.shape
        tokens, stride = tokens_and_stride(x)
        y = x.new_empty((*x.shape[:-1], out_features))
        result = native_linear(
            tier,
            values.data_ptr(),
            masks.data_ptr(),
            offsets.data_ptr(),
            out_features,
            in_features,
            _TYPES[packed.dtype],
            x.data_ptr(),
            stride,
            tokens,
            _TYPES[x.dtype],
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        if result:
            _library().check(result, "linear")
        return y

    @functools.cached_property
    def _kernel(self) -> tuple[Any, int]:
        library = _library()
        return library.native.spinfer_cpu_linear, library.tier_index(self._tier or library.tier)


def _library() -> CpuLibrary:
    library = load()
    if library is None:
        raise SpinferError(
            "spinfer's native CPU kernel is not installed; install a C++17 compiler and reinstall spinfer"
        )
    return library


def _pointers(packed: PackedWeight) -> tuple[int, ...]:
    values, masks, offsets = packed.parts
    return values.data_ptr(), masks.data_ptr(), offsets.data_ptr(), *packed.shape, _TYPES[packed.dtype]
