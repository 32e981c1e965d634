"""What a compiled kernel uses, read from the cubin itself: no cuobjdump and no GPU needed."""

from __future__ import annotations

import struct
from typing import NamedTuple

_SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr: name, type, flags, address, offset, size, link, ...
_VALUE_WITH_SIZE = 4  # EIFMT_SVAL of .nv.info: u8 format, u8 attribute, u16 size, then the value
_FRAME_SIZE, _REGISTERS = 0x11, 0x2F  # EIATTR_FRAME_SIZE, EIATTR_REGCOUNT: u32 symbol, u32 value


class Usage(NamedTuple):
    """Of one kernel: registers a thread, and bytes of local memory a thread (spills and stack)."""

    registers: int
    local_nbytes: int


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def kernel_usage(cubin: bytes, prefix: str) -> dict[str, Usage]:
    """By name, for the kernels whose names start with `prefix`."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    _, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [_SECTION.unpack_from(cubin, table + i * _SECTION.size) for i in range(count)]
    by_name = {_text(cubin, sections[names][4] + section[0]): section for section in sections}
    symbols, info = by_name[".symtab"], by_name[".nv.info"]
    strings = sections[symbols[6]][4]
    found: dict[str, dict[int, int]] = {}
    at = info[4]
    while at < info[4] + info[5]:
        kind, attribute, size = struct.unpack_from("<BBH", cubin, at)
        if kind == _VALUE_WITH_SIZE and attribute in (_FRAME_SIZE, _REGISTERS):
            symbol, value = struct.unpack_from("<II", cubin, at + 4)
            (name,) = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)
            found.setdefault(_text(cubin, strings + name), {})[attribute] = value
        at += 4 + (size if kind == _VALUE_WITH_SIZE else 0)
    return {
        name: Usage(values[_REGISTERS], values[_FRAME_SIZE])
        for name, values in found.items()
        if name.startswith(prefix)
    }
