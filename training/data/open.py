"""Opens the datasets of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from training.config import RunConfig
from training.data.dataset import DataError, PackedTokens, text_fingerprint
from training.data.manifest import read_manifest
from training.data.order import integer_shares


def open_data(cfg: RunConfig) -> tuple[PackedTokens, PackedTokens]:
    """The training text and the held-out text of a run.

    Raises DataError when a dataset cannot be used, or when its tokenizer has more entries than the model.
    """
    data = open_training_text(cfg)
    # the held-out order does not use the run's seed, so that all runs are scored on the same windows
    held_out = PackedTokens(data.sources, split="held_out", max_seq_len=data.max_seq_len, seed=0)
    if data.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"the tokenizer of {', '.join(data.sources)} has {data.vocab_size} entries, more than "
            f"model.vocab_size={cfg.model.vocab_size}; set model.vocab_size={data.vocab_size} or larger"
        )
    return data, held_out


def open_training_text(cfg: RunConfig) -> PackedTokens:
    """The training text of a run. Raises DataError when a dataset cannot be used."""
    sources = cfg.data.mixture or {cfg.data.data_dir: 1.0}
    return PackedTokens(sources, split="train", max_seq_len=cfg.training.max_seq_len, seed=cfg.training.seed)


def fingerprint_of_sources(sources: Mapping[str, float]) -> str:
    """The fingerprint that the training text of a mixture would have when it was opened; only manifests are read.

    sources: folder -> weight. Raises DataError when a manifest cannot be used.
    """
    manifests = [read_manifest(Path(folder)) for folder in sources]
    return text_fingerprint(manifests, integer_shares(list(sources.values())), "train")
