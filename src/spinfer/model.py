"""Find and replace the Linears of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from spinfer.checkpoint.select import Selection
from spinfer.errors import SpinferError
from spinfer.format import TcaBmeTensor, encode
from spinfer.format.layout import VALUE_DTYPES
from spinfer.linear import SparseLinear


@dataclass(frozen=True)
class LinearModules:
    """The Linears of a model by module name.

    Attributes:
        linears: (out_features, in_features) of those that can be compressed.
        dense: why the others are left alone.
    """

    linears: Mapping[str, tuple[int, int]]
    dense: Mapping[str, str]


@dataclass
class Replacement:
    """What `replace_linears` did.

    Attributes:
        modules: the encoded Linears by name.
        dense: Linears left dense, each with its reason.
    """

    modules: dict[str, SparseLinear] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)


def linear_modules(model: nn.Module) -> LinearModules:
    """List a model's Linears; it may be on the meta device.

    The output embedding is left alone by default, as pruning methods leave it, and so is a Linear whose weight is
    shared with another module (encoding one would untie them).
    """
    linears: dict[str, tuple[int, int]] = {}
    dense: dict[str, str] = {}
    output_embedding = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if module is output_embedding:
                dense[name] = "output embedding"
            elif type(module) is not nn.Linear:
                dense[name] = f"{type(module).__name__} is not a plain Linear"
            else:
                linears[name] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            dense[name] = "Conv1D keeps its weight transposed, (in_features, out_features); not supported"
    for name, reason in _tied(model, linears).items():
        del linears[name]
        dense[name] = reason
    return LinearModules(linears, dense)


def _tied(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module_name)
    tied = {}
    for name in names:
        weight = model.get_submodule(name).weight
        others = [owner for owner in owners[id(weight)] if owner != name]
        if others:
            tied[name] = f"weight tied to {others[0]}"
    return tied


def replace_linears(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replacement:
    """Encode a model's Linears in place, one at a time, and bring each into the layout of its device's kernel.

    Args:
        model: any module whose weights are loaded.
        include: patterns of module names to compress (`*.mlp.*`, or `re:` and a regular expression), all where empty.
        ignore: patterns of module names to leave dense.
        progress: called with (done, total) after each Linear.

    Raises:
        SpinferError: the model has no Linear that can be compressed, or a pattern matches none.
    """
    found = linear_modules(model)
    selection = Selection([*found.linears, *found.dense], include, ignore)
    result = Replacement(dense=dict(found.dense))
    for done, name in enumerate(found.linears):
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        encoded = selection.refusal(name) or _encode(dense.weight)
        if isinstance(encoded, str):
            result.dense[name] = encoded
        else:
            module = SparseLinear.from_weight(encoded, dense.bias).train(dense.training)
            model.set_submodule(name, module.pack_())
            result.modules[name] = module
        progress(done + 1, len(found.linears))
    if not result.modules:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(result.dense.items())[:3])
        raise SpinferError(f"nothing to compress in this {type(model).__name__} ({reasons or 'it has no Linear'})")
    return result


def _encode(weight: Tensor) -> TcaBmeTensor | str:
    """The encoded weight, or why it stays dense."""
    if weight.dtype not in VALUE_DTYPES.values():
        return f"values of {weight.dtype} are not supported"
    encoded = encode(weight)
    if encoded.nbytes >= weight.nbytes:
        return f"would be larger: density {encoded.density:.3f}"
    return encoded


def restore_linears(model: nn.Module) -> None:
    """Decode every `SparseLinear` back into an `nn.Linear`, in place, one at a time."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            weight = module.storage.decode()
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(weight, requires_grad=False)
            dense.register_parameter("bias", module.bias)
            model.set_submodule(name, dense.train(module.training))
