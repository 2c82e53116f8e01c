"""Byte-level BPE: training, loading, lossless encoding, and the number of bytes that each token stands for."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from training.data.corpus import CUT, PrepareError

EOD = "<|endoftext|>"
"""The end-of-document token, unless --eod_token names another."""

MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end-of-document token."""
CHUNK_CHARS = 1 << 16
_ROUND_TRIP = "a  B'S\r\n\n\tÄß1234 中文\u3000\U0001f600 \x7f x "
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = (EOD, "<|im_start|>", "<|im_end|>")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of vocab_size entries, the end-of-document token among them, that loses no byte.

    Raises PrepareError when vocab_size is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise PrepareError(f"--vocab_size {vocab_size} is below {MIN_VOCAB_SIZE}: the 256 bytes and {EOD}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # the trainer holds each text that it is given, so it is given chunks
    tokenizer.train_from_iterator((chunk for text in texts for chunk in chunks(text)), trainer)
    return tokenizer


def load(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json or of Qwen2.5's *.tiktoken rank file, without truncation, padding and dropout.

    Raises PrepareError when the file is neither, or when the tokenizer is not byte-level or changes a plain text. A
    tokenizer that changes only some texts is returned: whoever encodes checks each document (`pieces`).
    """
    try:
        tokenizer = from_tiktoken(path) if path.suffix == ".tiktoken" else Tokenizer.from_file(str(path))
    except PrepareError:
        raise
    except Exception as err:  # the library raises bare Exception for a missing or malformed file
        raise PrepareError(f"--tokenizer {path}: cannot be read ({err})") from err
    if not is_byte_level(tokenizer):
        raise PrepareError(f"--tokenizer {path} is not a byte-level BPE; bits per byte need one")
    # a tokenizer.json often holds these settings for batches of a fixed shape: they would drop or add tokens
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.model.dropout:
        tokenizer.model.dropout = None  # it would give other tokens at every preparation
    missing = set(_byte_letters().values()) - tokenizer.get_vocab().keys()
    if missing:
        raise PrepareError(f"--tokenizer {path} lacks {len(missing)} of the 256 bytes, whose text would be lost")
    back = tokenizer.decode(encode(tokenizer, _ROUND_TRIP), skip_special_tokens=False)
    if back != _ROUND_TRIP:
        raise PrepareError(
            f"--tokenizer {path} turns {_ROUND_TRIP!r} into {back!r}; decoding must return the text unchanged"
        )
    return tokenizer


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer spells every byte as a letter, so that its entries say how many bytes they stand for."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    return decoder is not None and decoder["type"] == "ByteLevel"


def from_tiktoken(path: Path) -> Tokenizer:
    """The Qwen2.5 tokenizer from its tiktoken rank file: 151,643 entries and three special tokens.

    A rank file has no merges. The last merge of a token is found by merging its bytes with lower ranks only.
    Raises PrepareError when the file cannot be read or is damaged.
    """
    try:
        ranks = {
            base64.b64decode(word): int(rank)
            for word, rank in (line.split() for line in path.read_bytes().splitlines() if line)
        }
    except (OSError, ValueError) as err:
        raise PrepareError(f"--tokenizer {path}: not a tiktoken rank file ({err})") from err
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append((spell(left), spell(right)))
    tokenizer = Tokenizer(models.BPE({spell(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in QWEN_SPECIAL])
    return tokenizer


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
        best, at = min(pairs)
        if best >= rank:
            raise PrepareError(f"rank file: token {rank} cannot be merged from lower ranks; the file is damaged")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte: a printable byte is itself, the rest are 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def vocab_size(tokenizer: Tokenizer) -> int:
    """The largest id, that of special tokens included, plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def sha256(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) uint16: the number of UTF-8 bytes that each id stands for; 0 for special tokens and unused ids."""
    sizes = np.zeros(vocab_size(tokenizer), dtype=np.uint16)
    added = tokenizer.get_added_tokens_decoder()
    for word, number in tokenizer.get_vocab(with_added_tokens=True).items():
        sizes[number] = len(word)  # one letter per byte
        if number in added:  # spelled as ordinary text
            sizes[number] = 0 if added[number].special else len(word.encode())
    return sizes


def chunks(text: str, size: int = CHUNK_CHARS) -> Iterator[str]:
    """Cuts `text` into chunks whose encodings, joined, are the encoding of the whole.

    A chunk ends at the first place to cut after `size` characters; corpus.UNBROKEN_CHARS bounds how far that is.
    """
    begin = 0
    while len(text) - begin > size:
        cut = CUT.search(text, begin + size)
        if cut is None:
            break
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of `text`. A special token's spelling in the text is encoded as ordinary text."""
    tokenizer.encode_special_tokens = True
    ids: list[int] = []
    for chunk in chunks(text):
        # a batch of one: this call alone does not compute the offsets of the tokens, which nobody reads
        ids += tokenizer.encode_batch_fast([chunk], add_special_tokens=False)[0].ids
    return ids


def pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that the tokenizer's decoder gives for each id; none for unused ids.

    Joined, the pieces of a document's ids are its decoded text. They equal its bytes when nothing was lost.
    """
    byte_of = {letter: byte for byte, letter in _byte_letters().items()}
    found = [b""] * vocab_size(tokenizer)
    for word, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if all(letter in byte_of for letter in word):
            found[number] = bytes(byte_of[letter] for letter in word)
        else:
            found[number] = word.encode()  # as the decoder does for what is not spelled in byte letters
    return found


def normalizer_name(tokenizer: Tokenizer) -> str | None:
    """The kind of the tokenizer's normaliser, which may change text; None when it has none."""
    normalizer = json.loads(tokenizer.to_str())["normalizer"]
    return normalizer and normalizer["type"]


def is_end_token(tokenizer: Tokenizer, word: str) -> bool:
    """Whether `word` is a special token, so that no text encodes to it."""
    number = tokenizer.token_to_id(word)
    added = tokenizer.get_added_tokens_decoder()
    return number in added and added[number].special
