"""CUDA kernels, compiled at run time from the sources in `csrc/`; importing touches neither CUDA nor a compiler."""

from spinfer.kernels.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
