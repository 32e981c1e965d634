"""Output that appears whole or not at all."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from checkpoint_models import DENSE, LINEARS, load_directory, same, write_compressed, write_dense
from spinfer.checkpoint import compress_checkpoint, decompress_checkpoint, inspect_checkpoint, writer
from spinfer.checkpoint.output import new_directory
from spinfer.errors import CheckpointError, OutputError


def compress(source: Path, output: Path, **options: Any) -> None:
    compress_checkpoint(source, output, linears=LINEARS, dense=DENSE, **options)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    write_dense(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link", "source"])
def test_output_that_exists(kind: str, dense: Path) -> None:
    output = dense.parent / "out"
    if kind == "directory":
        output.mkdir()
    elif kind == "file":
        output.write_text("precious")
    elif kind == "dangling link":
        output.symlink_to("nowhere")
    else:
        output = dense
    before = sorted(dense.parent.rglob("*"))
    with pytest.raises(OutputError, match=f"{output} exists already; remove it or choose another"):
        compress(dense, output)
    assert sorted(dense.parent.rglob("*")) == before


def test_decompress_refuses_an_output_that_exists(tmp_path: Path) -> None:
    write_compressed(tmp_path / "compressed")
    with pytest.raises(OutputError, match="exists already"):
        decompress_checkpoint(tmp_path / "compressed", tmp_path / "compressed")


def test_output_that_appears_meanwhile(dense: Path) -> None:
    output = dense.parent / "out"

    def progress(done: int, total: int) -> None:
        output.mkdir(exist_ok=True)
        (output / "precious").touch()

    with pytest.raises(OutputError, match="exists already"):
        compress(dense, output, progress=progress)
    assert [path.name for path in output.iterdir()] == ["precious"]
    assert not (dense.parent / ".out.partial").exists()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions do not bind root: act as nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that any user can reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_read_only_output(public: Path) -> None:
    write_dense(public / "dense")
    for path in (public / "dense").iterdir():
        path.chmod(0o644)
    (public / "shelf").mkdir()
    (public / "shelf").chmod(0o555)
    with (
        unprivileged(),
        pytest.raises(OutputError, match=r"shelf/\.out\.partial: cannot be written: Permission denied"),
    ):
        compress(public / "dense", public / "shelf" / "out")
    assert not list((public / "shelf").iterdir())


def test_parent_that_is_a_file(dense: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        compress(dense, dense / "config.json" / "out")


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Every write beyond `nbytes` of a file fails, as on a full disk (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [100, 10_000, 30_000])
def test_writes_that_fail(nbytes: int, dense: Path) -> None:
    with (
        file_size_limit(nbytes),
        pytest.raises(OutputError, match=r"\.out\.partial/.*cannot be written: File too large"),
    ):
        compress(dense, dense.parent / "out")
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]
    compress(dense, dense.parent / "out")
    inspect_checkpoint(dense.parent / "out")


class FailingDisk:
    """Counts binary writes and fsyncs, and lets all after the first `allowed` fail as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.allowed, self.calls = allowed, 0
        opened, fsync = Path.open, os.fsync

        def open_file(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = opened(path, mode, *args, **options)
            return CountedFile(file, self.count) if "w" in mode else file

        def flush(descriptor: int) -> None:
            self.count()
            fsync(descriptor)

        monkeypatch.setattr(Path, "open", open_file)
        monkeypatch.setattr(os, "fsync", flush)

    def count(self) -> None:
        self.calls += 1
        if self.calls > self.allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class CountedFile:
    def __init__(self, file: Any, count: Callable[[], None]) -> None:
        self._file, self._count = file, count

    def write(self, data: Any) -> int:
        self._count()
        return self._file.write(data)  # type: ignore[no-any-return]

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_disk_full_at_any_write(share: float, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FailingDisk(monkeypatch, allowed=sys.maxsize)
    compress(dense, dense.parent / "out", max_shard_nbytes=20_000)
    shutil.rmtree(dense.parent / "out")
    disk.allowed, disk.calls = int(disk.calls * share), 0
    assert share == 0.0 or disk.allowed
    with pytest.raises(OutputError, match="No space left on device; free space there"):
        compress(dense, dense.parent / "out", max_shard_nbytes=20_000)
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]


def test_real_full_disk(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(mount)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs needs root; test_writes_that_fail stands in for it")
    try:
        with pytest.raises(OutputError, match="No space left on device"):
            compress(tmp_path / "dense", mount / "out")
        assert not list(mount.iterdir())
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, CheckpointError])
def test_interrupted_runs_leave_nothing(error: type[BaseException], dense: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(error):
        compress(dense, dense.parent / "out", progress=progress)
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]


def test_source_damaged_midway_leaves_nothing(dense: Path) -> None:
    path = dense / "model.safetensors"

    def progress(done: int, total: int) -> None:
        os.truncate(path, 1000)

    with pytest.raises(CheckpointError, match="the file ended early"):
        compress(dense, dense.parent / "out", progress=progress)
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]


KILLED = """
import sys, time
from pathlib import Path
from checkpoint_models import DENSE, LINEARS
from spinfer.checkpoint import compress_checkpoint

def progress(done, total):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(60)

compress_checkpoint(sys.argv[1], sys.argv[2], linears=LINEARS, dense=DENSE, max_shard_nbytes=20_000, progress=progress)
"""


def test_killed_run(dense: Path) -> None:
    output, partial = dense.parent / "out", dense.parent / ".out.partial"
    paths = [str(Path(writer.__file__).parents[2]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(dense), str(output)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"half\n"
    with pytest.raises(OutputError, match="being written by another run"):
        compress(dense, output)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not output.exists()
    assert not list(partial.glob("*.safetensors"))
    assert not (partial / "config.json").exists()
    with pytest.raises(CheckpointError):
        inspect_checkpoint(partial)
    (partial / "sub").mkdir()
    (partial / "sub" / "stale").touch()
    compress(dense, output)
    assert not partial.exists()
    assert not (output / "sub").exists()
    decompress_checkpoint(output, dense.parent / "back")
    assert same(load_directory(dense.parent / "back"), load_directory(dense))


def test_partial_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "precious" / "file").exists()
