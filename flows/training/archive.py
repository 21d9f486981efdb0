"""The file of a checkpoint: an archive as `torch.save` writes it, sealed, and read as data alone.

The archive is a zip file, so `torch.load` reads it, too. Its comment is a seal, the checksum of all other bytes, which
tells any later change of the file. An archive without a seal, which somebody else has written, is checked by the
checksums of its entries.
"""

from __future__ import annotations

import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flows.training.unpickling import read_pickle

SEAL = b"flows crc32 %08x"
SEAL_LENGTH = len(SEAL % 0)
END = 22  # bytes of the last record of a zip file without a comment; its last two tell the comment's length
BLOCK = 1 << 20  # bytes read at a time
MAX_ENTRIES = 1_000_000
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")


class DamagedArchiveError(Exception):
    """The bytes are not those that were written, or no archive of tensors."""


class _Summed:
    """Passes bytes on to a file, and adds up their checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sum = 0

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_archive(content: Mapping[str, Any], file: BinaryIO) -> None:
    """Write nested plain values into an empty file, and seal it."""
    summed: Any = _Summed(file)
    torch.save(dict(content), summed)
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", SEAL_LENGTH) + SEAL % summed.sum)


def read_archive(file: BinaryIO) -> Any:
    """Read an archive; see `flows.training.unpickling` for what it may hold.

    Memory: the tensors and one block.

    Raises:
        DamagedArchiveError: it is no archive, or not as it was written.
        ForeignObjectError: it holds anything but data.
    """
    try:
        sealed = _check_seal(file)
        archive = _Entries(file, sealed)
        return read_pickle(bytes(archive.read("data.pkl")), archive.storage)
    except (
        zipfile.BadZipFile,
        struct.error,
        ValueError,
        LookupError,
        OverflowError,
        NotImplementedError,
        EOFError,
    ) as error:
        raise DamagedArchiveError(str(error) or type(error).__name__) from error


def _check_seal(file: BinaryIO) -> bool:
    """Return whether the archive is sealed, after checking the seal."""
    size = file.seek(0, os.SEEK_END)
    start = size - SEAL_LENGTH - 2
    file.seek(max(start, 0))
    tail = file.read()
    if tail[2:8] != SEAL[:6]:
        if size < END or not tail.endswith(b"\0\0"):
            raise DamagedArchiveError("its end is missing")
        return False
    file.seek(0)
    total, left = 0, start
    while left > 0:
        block = file.read(min(BLOCK, left))
        if not block:
            raise DamagedArchiveError("it ends too early")
        total, left = zlib.crc32(block, total), left - len(block)
    if tail != struct.pack("<H", SEAL_LENGTH) + SEAL % zlib.crc32(b"\0\0", total):
        raise DamagedArchiveError("its checksum does not fit its content")
    return True


class _Entries:
    """The entries of an archive, each stored as it is and read at most once."""

    def __init__(self, file: BinaryIO, sealed: bool) -> None:
        self.file = file
        self.sealed = sealed
        size = file.seek(0, os.SEEK_END)
        self.entries: dict[str, zipfile.ZipInfo] = {}
        self._left = size
        with zipfile.ZipFile(file) as archive:
            found = archive.infolist()
        if len(found) > MAX_ENTRIES:
            raise ValueError(f"it has {len(found):,} entries")
        prefix = found[0].filename.partition("/")[0] if found else ""
        for entry in found:
            folder, _, name = entry.filename.partition("/")
            if folder != prefix or not name or name in self.entries:
                raise ValueError(f"the entry {entry.filename!r} has no place in it, or occurs twice")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"the entry {entry.filename!r} is compressed, which no checkpoint is")
            if entry.flag_bits & 0x1:
                raise ValueError(f"the entry {entry.filename!r} is encrypted")
            self.entries[name] = entry
        if sum(entry.file_size for entry in found) > size:
            raise ValueError("its entries are larger than the file")
        if "byteorder" in self.entries and self.read("byteorder") != sys.byteorder.encode():
            raise ValueError("its byte order is not that of this machine")

    def read(self, name: str) -> bytearray:
        """Read an entry."""
        entry = self.entries[name]
        self.file.seek(entry.header_offset)
        header = self.file.read(LOCAL_HEADER.size)
        signature, *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
        if signature != b"PK\3\4" or self.file.read(name_length) != entry.filename.encode():
            raise ValueError(f"the entry {entry.filename!r} is not where it should be")
        self.file.seek(extra_length, os.SEEK_CUR)
        self._left -= entry.file_size
        if self._left < 0:
            raise ValueError("its entries overlap")
        data = bytearray(entry.file_size)
        if self.file.readinto(data) != entry.file_size:  # type: ignore[attr-defined]
            raise ValueError(f"the entry {entry.filename!r} ends too early")
        if not self.sealed and zlib.crc32(data) != entry.CRC:
            raise ValueError(f"the checksum of the entry {entry.filename!r} does not fit its content")
        return data

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:  # (n,)
        """Read the numbers of a tensor."""
        name = f"data/{key}"
        if name not in self.entries:
            raise ValueError(f"the numbers {name} are missing")
        size = self.entries[name].file_size
        if size != count * dtype.itemsize:
            raise ValueError(f"the numbers {name} take {size} bytes, and {count} of {dtype} were announced")
        return torch.frombuffer(self.read(name), dtype=dtype) if count else torch.empty(0, dtype=dtype)
