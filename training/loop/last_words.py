"""What a failing rank leaves for the others: its sentence and exit code reach those whose connection broke."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from gsa.files import write_atomically

WAIT_S = 5.0
"""How long a rank with a broken connection waits for another to say why."""


@dataclass(frozen=True)
class Words:
    """Why a rank ends. host: where it ran. launch: of which launch."""

    rank: int
    host: str
    reason: str
    exit_code: int
    launch: str


class LastWords:
    """A file for each failing rank, in the folder of the watchdog's signs of life.

    launch: a word that distinguishes this launch's files from those of an earlier one, the same on all ranks.
    """

    def __init__(self, output_dir: Path, *, rank: int, launch: str) -> None:
        self._dir, self._rank, self._launch = output_dir / ".ranks", rank, launch

    def leave(self, reason: str, exit_code: int) -> None:
        """Says why this rank ends. A disk that refuses it must not hide the error itself."""
        words = Words(self._rank, socket.gethostname(), reason, int(exit_code), self._launch)
        with suppress(OSError), write_atomically(self._file(self._rank), durable=False) as file:
            file.write(json.dumps(asdict(words)).encode())

    def of_another(self) -> Words | None:
        """What another rank of this launch has said, after waiting for it for a while; None when none has."""
        end = time.monotonic() + WAIT_S
        while True:
            for path in sorted(self._dir.glob(self._file("*").name)):
                with suppress(OSError, ValueError, TypeError):
                    words = Words(**json.loads(path.read_bytes()))
                    if words.launch == self._launch and words.rank != self._rank:
                        return words
            if time.monotonic() > end:
                return None
            time.sleep(0.1)

    def _file(self, rank: int | str) -> Path:
        return self._dir / f"last_words_rank_{rank}.json"


def is_broken_connection(err: Exception) -> bool:
    """Whether `err` is what a collective raises because another rank has gone, and so not this rank's own fault."""
    return isinstance(err, dist.DistError) or (isinstance(err, RuntimeError) and "gloo" in str(err))
