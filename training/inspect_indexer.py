"""Measures what the indexer of a checkpoint selects: `python -m training.inspect_indexer RUN`.

Prints two tables. The first shows how well each layer selects: the dense attention mass that its selected keys cover,
beside that of equally many best keys (the oracle) and of an untrained indexer in its place. The second shows how the
selected sets spread, which decides the kernel that pays at long context: the distinct keys of neighbouring queries by
those of one query (union/k), and the share of tiles of the causal triangle without a selected key, both beside random
sets of the same size. The text is held-out windows. Queries that select all their visible keys are left out of
coverage and union.

RUN is a run's folder, whose latest checkpoint is used, or a step_N folder.
Exit codes: 0 done; 2 refused argument; 3 refused checkpoint or data; 1 anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import read_config_json
from gsa.generation import check_device, checkpoint_of, load_model
from gsa.inspection import (
    Windows,
    coverage_table,
    measure_coverage,
    measure_spread,
    spread_table,
    with_untrained_indexer,
)
from training.checkpointing.tokenizer import require_same_tokenizer
from training.config.command import add_run, command_parser, run_command
from training.config.exit_codes import ExitCode, Refusal
from training.data.dataset import DataError, PackedTokens


def held_out(sources: Mapping[str, float], seq_len: int, n_windows: int, device: str = "cpu") -> Windows:
    """The first `n_windows` distinct held-out windows of prepared data, one per batch. DataError when it is damaged."""
    return windows_of(PackedTokens(sources, split="held_out", max_seq_len=seq_len, seed=0), n_windows, device)


def windows_of(data: PackedTokens, n_windows: int, device: str) -> Windows:
    """The first `n_windows` windows of an opened split, one per batch."""
    batches = (data.batch(np.array([i])) for i in data.distinct(n_windows))
    return [(batch.tokens.to(device), batch.doc_start.to(device)) for batch in batches]


def main(argv: Sequence[str]) -> int:
    parser = command_parser("inspect_indexer", __doc__)
    add_run(parser, "the folder of a run or of a checkpoint, e.g. outputs/quickstart or outputs/quickstart/step_300")
    parser.add_argument("--data", type=Path, help="folder of prepared data (default: that of the run)")
    parser.add_argument("--max_seq_len", type=int, help="tokens per window (default: that of the run)")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.windows < 1:
        raise Refusal(f"--windows {args.windows} must be at least 1")
    try:
        check_device(args.device)
    except ValueError as err:
        raise Refusal(str(err)) from err
    step_dir = checkpoint_of(args.run)
    model = load_model(step_dir, args.device)
    if not model.config.sparse:
        raise CheckpointError(f"{step_dir} holds a dense model (model.sparse=false): it has no indexer to inspect")
    config = read_config_json(step_dir)
    length = config["training"]["max_seq_len"] if args.max_seq_len is None else args.max_seq_len
    if not 1 <= length <= model.config.max_position_embeddings:
        raise Refusal(
            f"--max_seq_len {length} must be at least 1 and at most the model's max_position_embeddings="
            f"{model.config.max_position_embeddings}"
        )
    sources = config["data"]["mixture"] or {config["data"]["data_dir"]: 1.0}
    sources = {str(args.data): 1.0} if args.data else sources
    data = PackedTokens(sources, split="held_out", max_seq_len=length, seed=0)
    require_same_tokenizer(step_dir, data)
    if data.vocab_size > model.config.vocab_size:
        raise DataError(
            f"the tokenizer of {', '.join(sources)} has {data.vocab_size} entries, more than the model's "
            f"{model.config.vocab_size}; give the text of this model with --data"
        )
    windows = windows_of(data, args.windows, args.device)
    print(f"{step_dir.name}: {len(windows)} held-out windows of {length} tokens, k_base {model.config.k_base}\n")
    trained = measure_coverage(model, windows)
    untrained = measure_coverage(with_untrained_indexer(model, windows), windows)
    print(coverage_table(trained, untrained) + "\n")
    print(spread_table(*measure_spread(model, windows)))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(run_command(main))
