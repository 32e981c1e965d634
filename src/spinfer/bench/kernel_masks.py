"""Where the zeros of a benchmarked weight are: at random, as real pruning leaves them, or as suits a kernel least."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from spinfer.errors import SpinferError

MASKS = ("random", "rowwise", "clustered", "2:4", "extremes")
"""Made here; "wanda" is the name of a `RealMask`."""

_PART_ROWS = 4096


class RealMask:
    """The zeros of a really pruned model, tiled up; benchmarks/real_mask.py writes the file.

    Args:
        path: safetensors: by sparsity ("0.6"), uint8 [rows, columns / 8], bit j of byte i set where column 8 i + j is
            kept.
        device: of the weights.
    """

    def __init__(self, path: str | Path, device: torch.device | str) -> None:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                self.origin: str = (file.metadata() or {}).get("origin", str(path))
                self._kept = {float(name): _unpacked(file.get_tensor(name).to(device)) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise SpinferError(f"{path} is no mask file ({error}); write one with benchmarks/real_mask.py") from error

    @property
    def sparsities(self) -> tuple[float, ...]:
        """What the file has."""
        return tuple(sorted(self._kept))

    def kept(self, first: int, rows: int, columns: int, sparsity: float) -> Tensor:
        """Which weights stay, bool (rows, columns): row by row, pieces of the model's rows side by side."""
        if sparsity not in self._kept:
            raise SpinferError(f"no real mask of sparsity {sparsity}; the file has {self.sparsities}")
        source = self._kept[sparsity]
        pieces = -(-columns // source.shape[1])
        index = torch.arange(first * pieces, (first + rows) * pieces, device=source.device) % source.shape[0]
        return source[index].view(rows, -1)[:, :columns]


def _unpacked(octets: Tensor) -> Tensor:
    bits = torch.arange(8, dtype=torch.uint8, device=octets.device)
    return ((octets.unsqueeze(-1) >> bits) & 1).bool().view(octets.shape[0], -1)


def prune_(weight: Tensor, sparsity: float, mask: str, real: RealMask | None = None) -> Tensor:
    """Zero a share of a weight (M, K), in place.

    Args:
        weight: dense, without zeros.
        sparsity: share of zeros, in [0, 1]; "2:4" is always one half.
        mask: "random"; "rowwise", every row equally dense, as Wanda leaves it; "clustered", where blocks of 64 x 64 are
            dense, empty, or in between; "2:4"; "extremes", random, but with fully dense and fully empty rows, blocks of
            64 x 64, and stretches of 256 rows x 2048 columns; or "wanda", from `real`.
        real: for "wanda".
    """
    rows, columns = weight.shape
    if mask == "2:4" and columns % 4:
        raise SpinferError(f"the mask 2:4 needs a multiple of 4 columns, not {columns}")
    for start in range(0, rows, _PART_ROWS):
        part = weight[start : start + _PART_ROWS]
        if mask == "wanda":
            if real is None:
                raise SpinferError("the mask 'wanda' needs a mask file (--real-mask)")
            part.masked_fill_(~real.kept(start, part.shape[0], columns, sparsity), 0)
            continue
        score = torch.rand(part.shape, device=part.device)
        if mask == "random":
            part.masked_fill_(score < sparsity, 0)
        elif mask == "rowwise":
            part.scatter_(1, score.topk(round(columns * sparsity), dim=1).indices, 0)
        elif mask == "2:4":
            groups = score.view(-1, 4)
            part.view(-1, 4).scatter_(1, groups.topk(2, dim=1).indices, 0)
        elif mask == "clustered":
            part.masked_fill_(score < _blocks(_clustered(part.shape, sparsity, part.device), part.shape), 0)
        elif mask == "extremes":
            _set_extremes(score)
            part.masked_fill_(score < sparsity, 0)
        else:
            raise SpinferError(f"no mask {mask!r}; choose from {', '.join((*MASKS, 'wanda'))}")
    return weight


def _blocks(values: Tensor, shape: torch.Size) -> Tensor:
    """One value a block of 64 x 64, spread over the weights."""
    return values.repeat_interleave(64, 0).repeat_interleave(64, 1)[: shape[0], : shape[1]]


def _clustered(shape: torch.Size, sparsity: float, device: torch.device) -> Tensor:
    """Shares of zeros with about the right mean: a tenth of the blocks dense, a tenth empty, the rest spread about."""
    blocks = torch.rand(-(-shape[0] // 64), -(-shape[1] // 64), device=device)
    share = ((sparsity - 0.1) / 0.8 + (blocks - 0.5) * 0.6).clamp(0, 1)
    share[blocks < 0.1], share[blocks > 0.9] = 0, 1
    return share


def _set_extremes(score: Tensor) -> None:
    """Scores above 1 are kept and below 0 dropped, whatever the sparsity; both are equally many."""
    blocks = _blocks(torch.rand(-(-score.shape[0] // 64), -(-score.shape[1] // 64), device=score.device), score.shape)
    score[blocks < 0.05], score[blocks > 0.95] = 2, -1
    score[256:512, :2048], score[256:512, 2048:4096] = 2, -1
    score[5::97], score[6::97] = 2, -1
