"""Programmatic dependent launch: kernels after ours may start before ours end, but not before those ahead of ours do.

torch.compile with `triton.enable_pdl` makes kernels that wait only for what the kernel just before them has written.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spinfer import encode, linear, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper's kernels only"
    ),
]

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def write_late(flag):  # Triton evaluates annotations
    """Lets the next kernel start, and writes 20 ms later."""
    tl.extra.cuda.gdc_launch_dependents()
    start = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - start < 20_000_000:
        pass
    tl.store(flag, 1)


@triton.jit
def read_at_once(flag, out):
    """Does not wait for anything."""
    tl.store(out, tl.load(flag))


def seen(between: Callable[[], object]) -> int:
    """What a kernel reads that waits for nothing, `between` being launched before it and after the one that writes."""
    flag, out = (torch.zeros(1, device="cuda", dtype=torch.int32) for _ in range(2))
    torch.cuda.synchronize()
    write_late[(1,)](flag, launch_pdl=True)
    between()
    read_at_once[(1,)](flag, out, launch_pdl=True)
    return int(out)


def test_a_kernel_that_does_not_wait_reads_too_early_without_ours() -> None:
    for _ in range(2):  # the first compiles
        found = seen(lambda: None)
    assert found == 0, "this file's other test says nothing"


@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 256, 1500])
def test_what_was_before_ours_is_complete_after_it(tokens: int) -> None:
    w = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    w[torch.rand_like(w) < 0.6] = 0
    weight = pack(encode(w))
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
    linear(x, weight)
    assert [seen(lambda: linear(x, weight)) for _ in range(3)] == [1, 1, 1]
