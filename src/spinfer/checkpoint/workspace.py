"""A directory of finished parts beside an output, so that long work goes on where it was interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinfer.checkpoint.json_object import parse_json_object, read_json_object
from spinfer.checkpoint.output import refuse_existing, writing
from spinfer.checkpoint.writer import write_json
from spinfer.errors import CheckpointError, OutputError

_TASK = "task"
_REPORT = "report"


class Workspace:
    """Numbered parts, each some tensors and a report; a part is there whole or not at all.

    Attributes:
        path: of the directory.
    """

    def __init__(self, path: Path) -> None:
        """Use `workspace` to make one."""
        self.path = path

    def _part(self, number: int) -> Path:
        return self.path / f"part-{number:05d}.safetensors"

    def save(self, number: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Write a part.

        Raises:
            OutputError: it cannot be written; the parts before it are kept.
        """
        partial = self.path / "part.partial"
        with writing(self.path):
            try:
                save_file(dict(tensors), partial, metadata={_REPORT: json.dumps(report)})
            except SafetensorError as error:
                partial.unlink(missing_ok=True)
                raise OutputError(
                    f"{self.path}: cannot be written: {error}; free space there and run the same command again, it "
                    f"goes on after part {number}"
                ) from error
            partial.rename(self._part(number))

    def report(self, number: int) -> dict[str, Any] | None:
        """The report of a part, or None where it is not finished.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self._part(number).exists():
            return None
        with self._open(number) as file:
            return parse_json_object((file.metadata() or {}).get(_REPORT, "").encode(), str(self._part(number)))

    def tensor(self, number: int, name: str) -> Tensor:
        """One tensor of a part that is finished."""
        with self._open(number) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    @contextmanager
    def _open(self, number: int) -> Iterator[Any]:
        path = self._part(number)
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; remove it and run the same command again") from error

    def notes(self, name: str) -> Any:
        """What `note` wrote, or None."""
        path = self.path / f"{name}.json"
        return read_json_object(path)[name] if path.exists() else None

    def note(self, name: str, content: Any) -> None:
        """Keep a small result."""
        partial = self.path / "note.partial"
        write_json(partial, {name: content})
        with writing(self.path):
            partial.rename(self.path / f"{name}.json")

    def remove(self) -> None:
        """Once it is of no more use."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def workspace(output: Path, task: Mapping[str, Any]) -> Iterator[Workspace]:
    """Open the hidden sibling of an output; it stays until it is removed.

    Args:
        output: that the work is for; it must not exist.
        task: all that decides the result, for JSON. Parts of another task are not mixed in.

    Raises:
        OutputError: the output exists, another run is at work on it, or the directory cannot be made.
        CheckpointError: what is there is of another task.
    """
    refuse_existing(output)
    path = output.parent / f".{output.name}.work"
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{output} is being written by another run; wait for it") from None
        work = Workspace(path)
        known, before = json.loads(json.dumps(task)), work.notes(_TASK)
        if before is None:
            work.note(_TASK, known)
        elif before != known:
            differing = sorted(key for key in before.keys() | known.keys() if before.get(key) != known.get(key))
            raise CheckpointError(
                f"{path} holds the beginning of another run ({', '.join(differing)} differ); finish that with its "
                "options, or remove the directory to start anew"
            )
        yield work
    finally:
        os.close(lock)
