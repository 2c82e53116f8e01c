"""The tokenizer of a checkpoint: which one it is, where it is found, and whether another one is the same.

A checkpoint carries its tokenizer, and the run state its sha256. An older one names the folder of its text, where the
tokenizer is, if the text is still the one that it was trained on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from gsa.checkpoint import manifest
from gsa.checkpoint.full_state import read_run_state
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import TOKENIZER, RunState, read_config_json
from gsa.files import read_small_file
from training.data.dataset import DataError, PackedTokens
from training.data.manifest import MAX_TOKENIZER_BYTES, read_manifest, read_tokenizer
from training.data.open import fingerprint_of_sources

EOD = "<|endoftext|>"
"""The end-of-document token of a checkpoint that does not record another."""


class Loaded(NamedTuple):
    """A tokenizer, its end-of-document id or -1, and what could not be verified about it, or None."""

    tokenizer: Tokenizer
    eod_id: int
    warning: str | None


def load_tokenizer(step_dir: Path, given: Path | None, *, model_vocab_size: int) -> Loaded:
    """The tokenizer with which the text of a checkpoint was prepared.

    given: a tokenizer.json to use, which must be the same; None: that of the checkpoint, or of an older checkpoint's
    text. Raises CheckpointError when there is none, or when it is not the model's.
    """
    state = state_of(step_dir)
    own, whence = _own(step_dir, state)
    sha256 = state and state.tokenizer_sha256
    if own is not None:
        sha256 = sha256 or hashlib.sha256(own).hexdigest()
        if hashlib.sha256(own).hexdigest() != sha256:
            raise CheckpointError(f"{whence} is not the tokenizer of {step_dir}; restore the checkpoint from a copy")
    if given is None and own is None:
        raise CheckpointError(
            f"{step_dir} carries no tokenizer, and {whence}; name its tokenizer.json with --tokenizer"
        )
    path = whence if given is None else given
    try:
        content = own if given is None else read_small_file(given, MAX_TOKENIZER_BYTES)
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as err:  # the library raises bare Exception for a malformed file
        raise CheckpointError(f"no tokenizer at {path}: {getattr(err, 'strerror', None) or err}") from err
    entries = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if sha256 is not None and not _is(tokenizer, content, sha256):
        raise CheckpointError(
            f"--tokenizer {path} has {entries} entries and is not the tokenizer of {step_dir}; leave the option out"
        )
    if entries > model_vocab_size:
        raise CheckpointError(
            f"--tokenizer {path} has {entries} entries, more than the model's {model_vocab_size}: it is not the "
            f"tokenizer of {step_dir}"
        )
    eod_id = tokenizer.token_to_id(EOD) if state is None or state.eod_id is None else state.eod_id
    warning = None
    if sha256 is None:
        warning = (
            f"{step_dir} does not record its tokenizer, so whether {path} with {entries} entries is the one of this "
            f"model, which has room for {model_vocab_size}, cannot be verified"
        )
    return Loaded(tokenizer, -1 if eod_id is None else eod_id, warning)


def require_same_tokenizer(step_dir: Path, data: PackedTokens, *, otherwise: str = "") -> None:
    """Raises DataError when a checkpoint is known to be trained with another tokenizer than that of `data`.

    otherwise: what else a person may do, for the message.
    """
    state = state_of(step_dir)
    if state is not None and (line := other_tokenizer(step_dir, state, data)) is not None:
        raise DataError(f"{line}; give text that was prepared with --tokenizer {step_dir / TOKENIZER}{otherwise}")


def other_tokenizer(step_dir: Path, state: RunState, data: PackedTokens) -> str | None:
    """A sentence when the text is not of the checkpoint's tokenizer, so that the same ids mean other text; or None."""
    if state.tokenizer_sha256 in (None, data.tokenizer_sha256):
        return None
    return (
        f"{step_dir} was trained with another tokenizer ({state.tokenizer_entries} entries, sha256 "
        f"{state.tokenizer_sha256[:16]}) than that of {', '.join(data.sources)} ({data.vocab_size} entries, "
        f"{data.tokenizer_sha256[:16]})"
    )


def state_of(step_dir: Path) -> RunState | None:
    """The run state of a checkpoint; None for a folder of weights alone."""
    return read_run_state(step_dir) if next(step_dir.glob("*_states.pt"), None) is not None else None


def _own(step_dir: Path, state: RunState | None) -> tuple[bytes | None, Path | str]:
    """The tokenizer that the checkpoint carries or, of an older one, that of its text; its file, or what is missing."""
    path = step_dir / TOKENIZER
    if (step_dir / manifest.MANIFEST).exists():
        manifest.verify(step_dir, files=(TOKENIZER,))
    if path.exists():
        try:
            return read_small_file(path, MAX_TOKENIZER_BYTES), path
        except OSError as err:
            raise CheckpointError(f"{path}: cannot be read: {err.strerror}; restore it from a copy") from err
    if state is None:
        return None, "there is no run state that names its text"
    data = read_config_json(step_dir)["data"]
    sources = data["mixture"] or {data["data_dir"]: 1.0}
    folder = Path(next(iter(sources)))
    try:
        if fingerprint_of_sources(sources) != state.data_fingerprint:
            return None, f"{folder} no longer holds the text that it was trained on"
        content = read_tokenizer(folder, read_manifest(folder))
    except DataError as err:
        return None, f"that of its text is not found: {err}"
    return content, folder / TOKENIZER if content is not None else f"{folder} has none"


def _is(tokenizer: Tokenizer, content: bytes, sha256: str) -> bool:
    """Whether a tokenizer.json is the one of this sha256: byte for byte, or as prepare_data would write it."""
    if hashlib.sha256(content).hexdigest() == sha256:
        return True
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return hashlib.sha256(plain.to_str().encode()).hexdigest() == sha256
