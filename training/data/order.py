"""The order of the windows: keyed permutations that need no table, and mixtures of datasets. It needs numpy only.

The order is a contract: a run that is resumed years later must continue where it stopped. A golden test checks it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 6
BLOCK = 1000
"""Windows per block of a mixture. Shares are rounded to one part in BLOCK, and every block has exactly these shares."""

_U = np.uint64


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijective scramble of 64-bit numbers, the finaliser of splitmix64; overflow is intended."""
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))


def permute(index: np.ndarray, n: int, key: Hashable) -> np.ndarray:
    """Positions in the pseudo-random permutation of range(n) that `key` names, computed without a table.

    index: int64 array within range(n), n <= 2**62. key: any value with a stable repr.
    Returns int64, same shape. Raises IndexError outside the range. A mixed-radix Feistel network of six rounds on
    a x b >= n, repeated until the value is below n (Black and Rogaway, 2002).
    """
    index = np.asarray(index, dtype=np.int64)
    if not 0 < n <= 1 << 62:
        raise ValueError(f"a permutation needs 0 < n <= 2**62, not {n}")
    if index.size and not (0 <= index.min() and index.max() < n):
        raise IndexError(f"index outside range({n})")
    if n == 1:
        return index.copy()
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _round_keys(key)
    value = _feistel(index.astype(_U), _U(a), _U(b), keys)
    while (outside := value >= _U(n)).any():
        value[outside] = _feistel(value[outside], _U(a), _U(b), keys)
    return value.astype(np.int64)


def _unpermute(position: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The indices that `permute` sends to the given positions. keys: (..., ROUNDS), `_round_keys` of each position."""
    if n == 1:
        return position.copy()
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    value = _feistel_back(position.astype(_U), _U(a), _U(b), keys)
    while (outside := value >= _U(n)).any():
        value[outside] = _feistel_back(value[outside], _U(a), _U(b), keys[outside])
    return value.astype(np.int64)


def _round_keys(key: Hashable) -> np.ndarray:
    """(ROUNDS,) uint64."""
    return np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")


def _feistel(x: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    high, low = x // b, x % b
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        high = high + _scaled(_mix(low ^ even), a)
        high -= np.where(high >= a, a, _U(0))
        low = low + _scaled(_mix(high ^ odd), b)
        low -= np.where(low >= b, b, _U(0))
    return high * b + low


def _feistel_back(x: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    """The inverse of `_feistel`; keys: (..., ROUNDS), those of each element."""
    high, low = x // b, x % b
    for i in range(ROUNDS - 2, -1, -2):
        low = low + b - _scaled(_mix(high ^ keys[..., i + 1]), b)
        low -= np.where(low >= b, b, _U(0))
        high = high + a - _scaled(_mix(low ^ keys[..., i]), a)
        high -= np.where(high >= a, a, _U(0))
    return high * b + low


def _scaled(scramble: np.ndarray, radix: np.uint64) -> np.ndarray:
    """The upper half of a scramble, scaled to range(radix) by a multiplication; exact while radix < 2**32."""
    return ((scramble >> _U(32)) * radix) >> _U(32)


@dataclass(frozen=True)
class Place:
    """The origin of windows, as parallel int64 arrays: source number, epoch of that source, window of that source."""

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray


class Order:
    """Maps sample numbers to windows, for any mixture of sources, over any number of epochs.

    windows: the number of windows of each source. weights: their shares, on any positive scale. Each block of BLOCK
    windows holds the exact share of each source, in a keyed order. Each source has its own epochs: in each of them,
    every window occurs once, in a new order. Nothing depends on ranks or workers.
    """

    def __init__(self, windows: list[int], weights: list[float], seed: int) -> None:
        self.windows, self.seed = windows, seed
        self.parts = integer_shares(weights)
        self._starts = np.cumsum([0, *self.parts])

    def __call__(self, samples: np.ndarray) -> Place:
        samples = np.asarray(samples, dtype=np.int64)
        block, slot = np.divmod(samples, int(self._starts[-1]))
        if len(self.parts) > 1:
            for number in np.unique(block):
                here = block == number
                slot[here] = permute(slot[here], int(self._starts[-1]), (self.seed, "block", int(number)))
        source = np.searchsorted(self._starts, slot, side="right") - 1
        ordinal = block * np.asarray(self.parts)[source] + slot - self._starts[source]
        epoch, window = np.divmod(ordinal, np.asarray(self.windows)[source])
        for s, e in np.unique(np.stack([source, epoch], 1), axis=0) if len(samples) else ():
            here = (source == s) & (epoch == e)
            window[here] = permute(window[here], self.windows[s], (self.seed, "source", int(s), int(e)))
        return Place(source, epoch, window)

    def first_pass(self, count: int, sources: Sequence[int]) -> np.ndarray:
        """Sample numbers, ascending, of the first `count` windows of `sources` that no earlier sample number names.

        Those are the windows of the first pass over each source; when there are fewer than `count`, it is all of them.
        sources: the numbers of the sources to take windows of. Returns int64.
        """
        if len(self.parts) == 1:
            return np.arange(min(count, self.windows[0]))
        found = [self._samples_of(source, min(count, self.windows[source])) for source in sources]
        return np.sort(np.concatenate(found))[:count]

    def _samples_of(self, source: int, count: int) -> np.ndarray:
        """The sample numbers of the first pass over a source, in no order; at least the `count` lowest of them."""
        part, total = self.parts[source], int(self._starts[-1])
        ordinal = np.arange(min(-(-count // part) * part, self.windows[source]))
        block, slot = np.divmod(ordinal, part)
        numbers, at = np.unique(block, return_inverse=True)
        keys = np.stack([_round_keys((self.seed, "block", int(number))) for number in numbers])[at]
        return block * total + _unpermute(self._starts[source] + slot, total, keys)

    def epochs(self, samples: int) -> list[float]:
        """Passes over each source after `samples` windows; exact at block boundaries and for one source."""
        total = int(self._starts[-1])
        return [samples * part / total / windows for part, windows in zip(self.parts, self.windows, strict=True)]


def integer_shares(weights: list[float]) -> list[int]:
    """The windows of each source per block, at least 1, rounded by largest remainder; [1] for a single source."""
    if len(weights) == 1:
        return [1]
    exact = [BLOCK * w / sum(weights) for w in weights]
    parts = [max(1, math.floor(x)) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))
    for i in range(max(0, BLOCK - sum(parts))):
        parts[by_remainder[i % len(parts)]] += 1
    common = math.gcd(*parts)
    return [part // common for part in parts]
