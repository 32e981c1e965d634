"""A directory that appears under its name only when it is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spinfer.errors import OutputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a write into an `OutputError` that names `path`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}; free space there, or choose another output"
        ) from error


def refuse_existing(output: Path) -> None:
    """Raise where the output exists, before any work is done for it.

    Raises:
        OutputError: anything of that name, a dangling link included.
    """
    if os.path.lexists(output):
        raise OutputError(f"{output} exists already; remove it or choose another output")


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Yield a hidden sibling to write into; it is flushed to disk and renamed when the block succeeds, else removed.

    What a killed run left is cleared by the next run for the same output; a run that is still going is respected.

    Raises:
        OutputError: the output exists, another run is writing it, or it cannot be written.
    """
    refuse_existing(output)
    partial = output.parent / f".{output.name}.partial"
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    lock = _claim(partial, output)
    written = partial
    try:
        yield partial
        with writing(partial):
            _flush(partial)
            refuse_existing(output)
            written = partial.rename(output)
            _flush_one(output.parent)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _claim(partial: Path, output: Path) -> int:
    """Make the directory empty and ours; returns the descriptor that holds the lock on it."""
    with writing(partial):
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have renamed it in between; then the name is free or somebody else's.
            if not os.path.samestat(os.fstat(lock), partial.stat()):
                raise BlockingIOError
            for entry in partial.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        except BlockingIOError:
            os.close(lock)
            raise OutputError(f"{output} is being written by another run; wait for it") from None
        except BaseException:
            os.close(lock)
            raise
    return lock


def _flush(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            _flush_one(Path(root, name))
        _flush_one(Path(root))


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
