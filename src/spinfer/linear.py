"""`SparseLinear`: a drop-in for `nn.Linear` whose weight stays encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spinfer.errors import SpinferError
from spinfer.format import Geometry, TcaBmeTensor, encode
from spinfer.kernels import PackedWeight, pack, prepare, unpack
from spinfer.ops import linear

STORAGE_NAMES = ("weight", "weight_bitmap", "weight_offsets")
"""State-dict names of (values, bitmap, offsets). The values take the name of the dense weight, so that a loader which
does not know the format meets a 1-D tensor where it expects a matrix and fails, instead of leaving it uninitialised."""


class SparseLinear(nn.Module):
    """y = x W^T + b with W in TCA-BME.

    A new module holds zero-filled storage of the right size, ready for a state dict. `pack_()` brings the weight into
    the layout of the fastest kernel for its device; the state dict always shows the on-disk arrays, whichever layout
    is live, and moving or casting a packed module repacks it. The weight is constant; gradients flow to x and bias.

    Attributes:
        in_features: K.
        out_features: M.
        nnz: nonzeros of the weight.
        weight: 1-D values while unpacked; empty, with the same dtype and device, once packed.
        bias: (out_features,) or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        nnz: int,
        values_len: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.nnz = in_features, out_features, nnz
        self._shape = (out_features, in_features)
        geometry = Geometry(out_features, in_features)
        self.weight = nn.Parameter(torch.zeros(values_len, device=device, dtype=dtype), requires_grad=False)
        self.register_buffer(STORAGE_NAMES[1], torch.zeros(geometry.bitmap_words, device=device, dtype=torch.int64))
        self.register_buffer(STORAGE_NAMES[2], torch.zeros(geometry.offsets_len, device=device, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self._packed: PackedWeight | None = None

    @classmethod
    def from_weight(cls, weight: TcaBmeTensor, bias: Tensor | None = None) -> SparseLinear:
        """Wrap an encoded weight, and a bias (out_features,); memory is shared, not copied."""
        module = cls(
            weight.shape[1],
            weight.shape[0],
            nnz=weight.nnz,
            values_len=0,
            bias=False,
            device="meta",
            dtype=weight.dtype,
        )
        module._set_storage(weight)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return module

    @classmethod
    def from_linear(cls, dense: nn.Linear) -> SparseLinear:
        """Encode a dense layer's weight; its bias is shared. The module comes packed for its device."""
        module = cls.from_weight(encode(dense.weight), dense.bias).pack_()
        return module.train(dense.training)

    @property
    def storage(self) -> TcaBmeTensor:
        """The weight in on-disk order (a fresh copy when another layout is live)."""
        if self._packed is not None:
            return unpack(self._packed)
        bitmap, offsets = (self.get_buffer(name) for name in STORAGE_NAMES[1:])
        return TcaBmeTensor(self.weight.detach(), bitmap, offsets, self._shape, self.nnz)

    @property
    def is_packed(self) -> bool:
        """Whether the weight is in a kernel's layout."""
        return self._packed is not None

    @property
    def weight_nbytes(self) -> int:
        """Bytes that the weight takes as it is held now."""
        return self._packed.nbytes if self._packed is not None else self.storage.nbytes

    def pack_(self) -> SparseLinear:
        """Bring the weight into the layout of the fastest kernel for its device, in place; returns self."""
        if self._packed is None:
            packed = pack(self.storage)
            empty = self.weight.new_empty(0)
            self.weight = nn.Parameter(empty, requires_grad=False)
            for name in STORAGE_NAMES[1:]:
                setattr(self, name, None)
            for index, part in enumerate(packed.parts):  # so that memory footprints count them
                self.register_buffer(f"packed_{index}", part, persistent=False)
            self._packed = packed
            prepare(packed)
        return self

    def unpack_(self) -> SparseLinear:
        """Bring the weight back into on-disk order, in place; returns self."""
        if self._packed is not None:
            storage = unpack(self._packed)
            for index in range(len(self._packed.parts)):
                delattr(self, f"packed_{index}")
            self._packed = None
            self._set_storage(storage)
        return self

    def keep_(self, weight: TcaBmeTensor) -> SparseLinear:
        """Hold a part of the weight instead of the whole, in on-disk order: a tensor-parallel rank's share.

        `in_features` and `out_features` go on saying how large the whole layer is.
        """
        self.unpack_()
        self._set_storage(weight)
        self._shape, self.nnz = weight.shape, weight.nnz
        return self

    def _set_storage(self, weight: TcaBmeTensor) -> None:
        self.weight = nn.Parameter(weight.values.detach(), requires_grad=False)
        setattr(self, STORAGE_NAMES[1], weight.bitmap)
        setattr(self, STORAGE_NAMES[2], weight.offsets)

    def forward(self, x: Tensor) -> Tensor:
        """Compute y = x W^T + b; x is (..., in_features), y (..., out_features) of x's dtype."""
        return linear(x, self._packed if self._packed is not None else self.storage, self.bias)

    def extra_repr(self) -> str:
        """Shape and density for `print(model)`."""
        density = self.nnz / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"density={density:.3f}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseLinear:
        # Moves and casts are defined on the storage: a packed layout belongs to one device and one dtype.
        was_packed = self.is_packed
        self.unpack_()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_packed and self.weight.device.type != "meta":
            self.pack_()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A pickle may be opened on another machine, whose kernels read another layout: it carries the on-disk arrays.
        state = self.__dict__ | {"_repack": self.is_packed}
        if self.is_packed:
            bare = SparseLinear.from_weight(self.storage)
            state |= {"_packed": None, "_buffers": bare._buffers}
            state["_parameters"] = self._parameters | {"weight": bare.weight}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        repack = state.pop("_repack", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if repack and self.weight.device.type != "meta":
            self.pack_()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            storage = unpack(self._packed)
            for name, part in zip(STORAGE_NAMES, (storage.values, storage.bitmap, storage.offsets), strict=True):
                destination[prefix + name] = part

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        keys = [prefix + name for name in STORAGE_NAMES]
        missing = [key for key in keys if key not in state_dict]
        if len(missing) == len(keys):  # reported by load_state_dict, which knows whether it is strict
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        if missing:
            raise SpinferError(f"the state dict lacks {', '.join(missing)}")
        values, bitmap, offsets = (state_dict[key] for key in keys)
        loaded = TcaBmeTensor(values, bitmap, offsets, self._shape, self.nnz).validate()
        was_packed = self.is_packed
        self.unpack_()
        if self.weight.shape != loaded.values.shape:
            self.weight = nn.Parameter(self.weight.new_zeros(loaded.values.shape), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if was_packed:
            self.pack_()
