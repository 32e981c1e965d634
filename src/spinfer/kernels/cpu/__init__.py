"""The native CPU kernel: panels of 32 rows, expanded in registers as they stream from memory (docs/cpu_kernel.md)."""

from spinfer.kernels.cpu.backend import CPU_LAYOUT, CpuBackend

__all__ = ["CPU_LAYOUT", "CpuBackend"]
