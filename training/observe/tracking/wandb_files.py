"""Reading the log that W&B writes on disk: which steps an offline run already holds."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 32 * 1024

_FILE_HEAD, _CHUNK_HEAD = 7, struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def logged_step(folder: Path, run_id: str) -> int | None:
    """The greatest step in any transaction log of this run under wandb's folder; None when there is none."""
    found = [last_step(path) for path in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb")]
    return max((step for step in found if step is not None), default=None)


def last_step(path: Path) -> int | None:
    """The step of the last history row in a transaction log of wandb; None when it has none, or is not there."""
    from wandb.proto.wandb_internal_pb2 import Record

    size = path.stat().st_size if path.exists() else 0
    for blocks in (8, 128, size // _BLOCK + 1):  # a log has gigabytes, and its last row is near its end
        found = None
        for raw in log_records(path, first_block=max(0, size // _BLOCK + 1 - blocks)):
            record = Record.FromString(raw)
            if record.WhichOneof("record_type") == "history":
                found = record.history.step.num
        if found is not None or blocks > size // _BLOCK:
            return found
    return found


def log_records(path: Path, first_block: int = 0) -> Iterator[bytes]:
    """The serialized records of a transaction log of wandb: LevelDB's log format behind a head of 7 bytes.

    first_block: where to begin, in blocks of 32 KiB; a record that began before is left out. What a torn or wrong
    checksum spoils is left out too, up to the next block.
    """
    with open(path, "rb") as file:
        file.seek(first_block * _BLOCK)
        whole: bytes | None = None
        while block := file.read(_BLOCK):
            place = _FILE_HEAD if first_block == 0 and file.tell() <= _BLOCK else 0
            while place + _CHUNK_HEAD.size <= len(block):
                checksum, length, kind = _CHUNK_HEAD.unpack_from(block, place)
                place += _CHUNK_HEAD.size
                data = block[place : place + length]
                if checksum != zlib.crc32(data, zlib.crc32(bytes([kind]))):
                    whole = None
                    break
                place += length
                if kind in (_FULL, _FIRST):
                    whole = b""
                if whole is not None:
                    whole += data
                    if kind in (_FULL, _LAST):
                        yield whole
                        whole = None
