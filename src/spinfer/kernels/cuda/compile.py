"""CUDA C++ from this package to cubins: NVRTC in a child process, results in a disk cache.

Needs no GPU, no driver and no CUDA toolkit: NVRTC comes with the extra `spinfer[cuda]`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from spinfer import env
from spinfer.errors import SpinferError

SOURCES = Path(__file__).parent / "csrc"

_TIMEOUT_S = 300
"""The largest kernel takes about 5 s on a slow core; a compiler that hangs must not hang its caller."""

_DIGEST_NBYTES = 32


class CompileError(SpinferError, RuntimeError):
    """NVRTC is missing, refused a kernel, or crashed."""


@dataclass(frozen=True)
class KernelSource:
    """One translation unit with its options.

    Attributes:
        file: name in `csrc/`.
        arch: "sm_90a", "sm_80", ...
        defines: macros, as sorted (name, value) pairs.
    """

    file: str
    arch: str
    defines: tuple[tuple[str, int], ...] = ()


@functools.cache
def source_digest() -> bytes:
    """Of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


@functools.cache
def _compiler_versions() -> str:
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        return f"cuda-core {importlib.metadata.version('cuda-core')}, nvrtc {major}.{minor}"
    except Exception as error:
        raise CompileError(f"NVRTC is not usable ({error}); install it with: pip install 'spinfer[cuda]'") from error


def cache_key(source: KernelSource) -> str:
    """Hex name of the cache entry: every source file, the options, the architecture, the compiler's versions."""
    options = json.dumps([source.file, source.arch, source.defines, _compiler_versions()])
    return hashlib.sha256(source_digest() + options.encode()).hexdigest()


_compiling: dict[KernelSource, threading.Lock] = {}


def cubin(source: KernelSource) -> bytes:
    """The compiled kernel, from the cache or from NVRTC.

    An entry is written to a temporary name and renamed, and carries its own digest, so that neither two processes at
    once nor a full disk can leave one that loads and is wrong.

    Raises:
        CompileError: see there.
    """
    with _compiling.setdefault(source, threading.Lock()):  # the second of two threads finds what the first has made
        code = _cached(source)
        if code is None:
            code = compile_source(source)
            write_whole(_path(source), hashlib.sha256(code).digest() + code)
    return code


def is_cached(source: KernelSource) -> bool:
    """Whether the cache has an entry for it; only `cubin` looks whether that is whole."""
    return _path(source).is_file()


def _path(source: KernelSource) -> Path:
    return env.cache_directory() / f"{source.file.removesuffix('.cu')}-{source.arch}-{cache_key(source)[:32]}.cubin"


def _cached(source: KernelSource) -> bytes | None:
    try:
        entry = _path(source).read_bytes()
    except OSError:
        return None
    code = entry[_DIGEST_NBYTES:]
    return code if hashlib.sha256(code).digest() == entry[:_DIGEST_NBYTES] else None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file of the cache under another name, then rename it; warns once where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(data)
                file.close()
                Path(file.name).replace(path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        _warn_uncached(str(error))


@functools.cache
def _warn_uncached(reason: str) -> None:
    warnings.warn(
        f"compiled kernels cannot be kept ({reason}): every process compiles, and measures, them again. "
        "Set SPINFER_CACHE_DIR to a writable directory.",
        stacklevel=2,
    )


def compile_source(source: KernelSource) -> bytes:
    """Compile in a child process; returns the cubin.

    Raises:
        CompileError: with the compiler's log.
    """
    _compiler_versions()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.cubin"
        job = {
            "source": str(SOURCES / source.file),
            "include": str(SOURCES),
            "arch": source.arch,
            "defines": dict(source.defines),
            "output": str(output),
        }
        # -P: the worker's folder must not come first on its path; its `select` would hide the standard library's.
        command = [sys.executable, "-P", str(Path(__file__).with_name("nvrtc_worker.py"))]
        try:
            child = subprocess.run(
                command, input=json.dumps(job), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(f"compiling {source} failed: {error}") from error
        if child.returncode:
            how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
            raise CompileError(f"compiling {source} ended with {how}:\n{child.stderr[-4000:]}")
        return output.read_bytes()
