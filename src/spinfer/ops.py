"""The op `torch.ops.spinfer.linear`: schema, fake, implementation and gradient; `linear` is its public face.

One op serves every layout: the parts travel as a tensor list beside the layout's name, so torch.compile, torch.export
and CUDA graphs see one opaque call, and backends are slotted in behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spinfer.errors import SpinferError
from spinfer.format import TcaBmeTensor
from spinfer.kernels import TILEWISE, PackedWeight, backend_of, unpack
from spinfer.kernels.packed import WeightSpec, as_packed

_ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_library = torch.library.Library("spinfer", "DEF")
_SCHEMA = "Tensor[] parts, str layout, int[] shape, int nnz, ScalarType dtype"
# No default for bias: the dispatcher drops trailing defaults, and then the gradient's structure does not match.
_library.define(f"linear(Tensor x, {_SCHEMA}, Tensor? bias) -> Tensor")
_library.define(f"linear_input_gradient(Tensor grad, {_SCHEMA}) -> Tensor")


def _packed(parts: Sequence[Tensor], layout: str, shape: Sequence[int], nnz: int, dtype: torch.dtype) -> PackedWeight:
    return PackedWeight(WeightSpec.known(layout, shape[0], shape[1], nnz, dtype), tuple(parts))


def _linear(
    x: Tensor,
    parts: Sequence[Tensor],
    layout: str,
    shape: Sequence[int],
    nnz: int,
    dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    _check_width(x, shape[1])
    return _run(x, _packed(parts, layout, shape, nnz, dtype), bias)


def _check_width(x: Tensor, in_features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise SpinferError(f"x has shape {tuple(x.shape)}; its last side must be in_features = {in_features}")


def _run(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    out_features, in_features = packed.shape
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    if x.dim() == 2:
        if x.stride(1) != 1:
            x = x.contiguous()
    elif not x.is_contiguous():
        return _run(x.reshape(-1, in_features), packed, bias).view(*x.shape[:-1], out_features)
    return backend_of(packed.layout).linear(x, packed, bias)


def _linear_input_gradient(
    grad: Tensor, parts: Sequence[Tensor], layout: str, shape: Sequence[int], nnz: int, dtype: torch.dtype
) -> Tensor:
    storage = as_packed(unpack(_packed(parts, layout, shape, nnz, dtype)))
    flat = TILEWISE.input_gradient(grad.reshape(-1, shape[0]), storage)
    return flat.view(*grad.shape[:-1], shape[1])


def _linear_fake(x: Tensor, parts: Any, layout: Any, shape: Sequence[int], *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _linear_input_gradient_fake(grad: Tensor, parts: Any, layout: Any, shape: Sequence[int], *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, layout, shape, nnz, dtype, *bias = inputs
    ctx.save_for_backward(*parts)
    ctx.weight = (layout, shape, nnz, dtype)
    ctx.has_bias = bool(bias) and bias[0] is not None
    ctx.no_parts = [None] * len(parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.spinfer.linear_input_gradient(grad, ctx.saved_tensors, *ctx.weight)
    if ctx.has_bias and ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, ctx.no_parts, None, None, None, None, grad_bias


def _input_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_grad = torch.ops.spinfer.linear(grad, ctx.saved_tensors, *ctx.weight, None)
    return grad_grad, ctx.no_parts, None, None, None, None


for _name, _impl, _fake in (
    ("linear", _linear, _linear_fake),
    ("linear_input_gradient", _linear_input_gradient, _linear_input_gradient_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _impl, _key)
    torch.library.register_fake(f"spinfer::{_name}", _fake, lib=_library)
for _name, _gradient in (("linear", _backward), ("linear_input_gradient", _input_gradient_backward)):
    torch.library.register_autograd(f"spinfer::{_name}", _gradient, setup_context=_setup_context, lib=_library)


def _nobody_watches(x: Tensor, bias: Tensor | None) -> bool:
    """Whether calling the kernel itself gives what the op would: nothing traces, differentiates or wraps this call.

    Python dispatch costs 13 us a call (no_grad; 9 us in inference_mode), more than the kernel of a small layer,
    and a decode step makes hundreds of calls.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return (
        torch._C._len_torch_dispatch_stack() == 0  # fake tensors, FLOP counters, ...
        and not torch._C._are_functorch_transforms_active()  # vmap, grad, jvp
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def linear(x: Tensor, weight: TcaBmeTensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute y = x W^T + bias with a sparse weight, accumulated in fp32 or better.

    Args:
        x: (..., in_features), fp16, bf16 or fp32, on the weight's device; its dtype may differ from the values'.
        weight: an encoded weight, or one that `pack` brought into the layout of the fastest kernel for its device
            (pack once and keep the result: an unpacked weight runs on the portable path).
        bias: (out_features,) of x's dtype, or None.

    Returns:
        (..., out_features), dtype of x. Gradients flow to x and bias; the weight is constant. Under torch.autocast x
        and bias are converted to its dtype first, as by F.linear.

    Raises:
        SpinferError: shapes, dtypes or devices do not fit.
    """
    packed = as_packed(weight) if isinstance(weight, TcaBmeTensor) else weight
    out_features, in_features = packed.shape
    _check_width(x, in_features)
    if x.dtype not in _ACTIVATION_DTYPES:
        raise SpinferError(f"x is {x.dtype}; convert it to fp16, bf16 or fp32")
    if x.device != packed.device:
        raise SpinferError(f"x is on {x.device} but the weight on {packed.device}; move one of them")
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != x.dtype or bias.device != x.device):
        raise SpinferError(
            f"bias is {tuple(bias.shape)} {bias.dtype} on {bias.device}; "
            f"expected ({out_features},) {x.dtype} on {x.device}"
        )
    if _nobody_watches(x, bias):
        return _run(x, packed, bias)
    y: Tensor = torch.ops.spinfer.linear(x, packed.parts, packed.layout, packed.shape, packed.nnz, packed.dtype, bias)
    return y
