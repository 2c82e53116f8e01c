"""Reads the transaction log that W&B writes on disk, to find which steps an offline run already holds."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

# LevelDB's log format: blocks of 32 KiB, in which a record is one chunk or several. wandb puts 7 bytes before it.
_BLOCK = 32 * 1024
_FILE_HEAD = 7
_CHUNK_HEAD = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def logged_step(folder: Path, run_id: str) -> int | None:
    """The last step in the transaction logs of this run under wandb's folder; None when they have none."""
    found = [last_step(path) for path in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb")]
    return max((step for step in found if step is not None), default=None)


def last_step(path: Path) -> int | None:
    """The step of the last history row in a transaction log; None when there is no such row or no file."""
    from wandb.proto.wandb_internal_pb2 import Record

    size = path.stat().st_size if path.exists() else 0
    for blocks in (8, 128, size // _BLOCK + 1):  # a log may have gigabytes, and its last row is near its end
        found = None
        for raw in log_records(path, first_block=max(0, size // _BLOCK + 1 - blocks)):
            record = Record.FromString(raw)
            if record.WhichOneof("record_type") == "history":
                found = record.history.step.num
        if found is not None or blocks > size // _BLOCK:
            return found
    return found


def log_records(path: Path, first_block: int = 0) -> Iterator[bytes]:
    """The serialized records of a transaction log.

    first_block: the block of 32 KiB to start at; a record that began before it is skipped. Where a checksum is wrong
    or a chunk is cut off, the record and the rest of its block are skipped.
    """
    with open(path, "rb") as file:
        file.seek(first_block * _BLOCK)
        record: bytes | None = None
        while block := file.read(_BLOCK):
            place = _FILE_HEAD if first_block == 0 and file.tell() <= _BLOCK else 0
            while place + _CHUNK_HEAD.size <= len(block):
                checksum, length, kind = _CHUNK_HEAD.unpack_from(block, place)
                place += _CHUNK_HEAD.size
                data = block[place : place + length]
                if checksum != zlib.crc32(data, zlib.crc32(bytes([kind]))):
                    record = None
                    break
                place += length
                if kind in (_FULL, _FIRST):
                    record = b""
                if record is not None:
                    record += data
                    if kind in (_FULL, _LAST):
                        yield record
                        record = None
