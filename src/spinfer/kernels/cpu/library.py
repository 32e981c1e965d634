"""The native library: found, checked and bound once. It links nothing of torch; pointers cross as integers."""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from ctypes import c_char_p, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch

from spinfer import env
from spinfer.errors import FormatError, SpinferError

_ABI = 1
_OUT_OF_MEMORY = -1
_SUFFIX = "dylib" if sys.platform == "darwin" else "so"
_PATH = Path(__file__).parent / f"libspinfer_cpu.{_SUFFIX}"

_WEIGHT = (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int)  # values, masks, offsets, M, K, type
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "abi": (c_int, ()),
    "message": (c_char_p, (c_int,)),
    "tiers": (c_int, ()),
    "tier_name": (c_char_p, (c_int,)),
    "tier_supported": (c_int, (c_int,)),
    "tier_best": (c_int, ()),
    "set_pool": (None, (c_void_p,)),
    "pack_plan": (c_int, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int)),
    "pack": (
        c_int,
        (c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int, c_void_p, c_void_p, c_void_p, c_int),
    ),
    "unpack_plan": (c_int, (c_void_p, c_int64, c_int64, c_int, c_void_p, c_void_p, c_int)),
    "unpack": (c_int, (*_WEIGHT, c_void_p, c_void_p, c_void_p, c_int)),
    "linear": (c_int, (c_int, *_WEIGHT, c_void_p, c_int64, c_int64, c_int, c_void_p, c_void_p, c_int)),
    "read": (c_uint64, (c_void_p, c_int64, c_int)),
}


class CpuLibrary:
    """The C functions of spinfer_cpu.h and the instruction tiers that this machine has.

    Attributes:
        native: the loaded library; its functions carry their argument types.
        tiers: names of the tiers that this CPU can run, best first.
        tier: the one that runs: `SPINFER_CPU_TIER`, or the fastest.
    """

    def __init__(self, path: Path) -> None:
        self.native = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.native, f"spinfer_cpu_{name}")
            function.restype, function.argtypes = result, arguments
        if self.native.spinfer_cpu_abi() != _ABI:
            raise SpinferError(f"{path} belongs to another version of spinfer; reinstall the package")
        count = self.native.spinfer_cpu_tiers()
        self._names = tuple(self.native.spinfer_cpu_tier_name(index).decode() for index in range(count))
        self.tiers = tuple(name for i, name in enumerate(self._names) if self.native.spinfer_cpu_tier_supported(i))
        self.tier = env.cpu_tier() or self._names[self.native.spinfer_cpu_tier_best()]
        self.tier_index(self.tier)
        self._share_pool()

    def tier_index(self, name: str) -> int:
        """A tier as `spinfer_cpu_linear` takes it.

        Raises:
            SpinferError: no such tier, or this CPU lacks its instructions.
        """
        if name not in self.tiers:
            why = "needs instructions that this CPU lacks" if name in self._names else "does not exist"
            raise SpinferError(f"the CPU tier {name!r} {why}; this machine runs {', '.join(self.tiers)}")
        return self._names.index(name)

    def check(self, result: int, what: str) -> None:
        """Raise what a function of the library returned.

        Raises:
            MemoryError: no memory for its workspace.
            FormatError: any other failure, in words.
        """
        if result == _OUT_OF_MEMORY:
            raise MemoryError(f"{what}: out of memory")
        if result:
            raise FormatError(f"{what}: {self.native.spinfer_cpu_message(result).decode()}")

    def _share_pool(self) -> None:
        # The symbol is looked up among torch's own dependencies, so it is torch's OpenMP runtime, whichever file that
        # is. A second runtime would bring a second set of threads, which preempt torch's.
        torch_library = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{_SUFFIX}"
        try:
            pool = ctypes.cast(ctypes.CDLL(str(torch_library)).GOMP_parallel, c_void_p)
        except (OSError, AttributeError):
            warnings.warn(
                "torch's OpenMP threads cannot be reached; spinfer's CPU kernel runs on one thread", stacklevel=2
            )
            return
        self.native.spinfer_cpu_set_pool(pool)


@functools.lru_cache(maxsize=1)
def load() -> CpuLibrary | None:
    """The library, or None, after one warning, when the package was installed without it.

    Raises:
        SpinferError: the library is of another version, or `SPINFER_CPU_TIER` names a tier that cannot run here.
    """
    if not _PATH.exists():
        warnings.warn(
            "spinfer was installed without its native CPU kernel (no C++ compiler was found): sparse layers on the CPU "
            "run on the much slower pure-torch path. Install a C++17 compiler (g++ or clang++) and reinstall spinfer.",
            stacklevel=2,
        )
        return None
    return CpuLibrary(_PATH)
