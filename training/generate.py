"""Continues a prompt with a trained model: `python -m training.generate outputs/quickstart --prompt "def "`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenizers import Tokenizer

from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError
from gsa.generation import Sampling, check_device, generate, load_model, stream_text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="training.generate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder (its latest checkpoint) or a step_N folder")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: that of the run's data)")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=40, help="candidates kept, 0 all (default: %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability kept, 1 all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs, as cuda (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        if args.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
        if not all(args.prompt):
            raise ValueError("--prompt is empty; give at least one character")
        check_device(args.device)
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    try:
        step_dir = args.run if args.run.name.startswith("step_") else manifest.resolve("latest", args.run)
        model = load_model(step_dir, args.device)
        path = args.tokenizer or _run_tokenizer(step_dir)
        if not path.exists():
            raise CheckpointError(f"no tokenizer at {path}; name one with --tokenizer")
    except CheckpointError as err:
        print(f"error: {err}", file=sys.stderr)
        return 3
    tokenizer = Tokenizer.from_file(str(path))
    eod_id = tokenizer.token_to_id("<|endoftext|>")
    for prompt in args.prompt:
        print(prompt, end="", flush=True)
        new = generate(
            model,
            tokenizer.encode(prompt, add_special_tokens=False).ids,
            max_new_tokens=args.max_new_tokens,
            eod_id=-1 if eod_id is None else eod_id,
            sampling=sampling,
        )
        for piece in stream_text(tokenizer, new):
            print(piece, end="", flush=True)
        print("\n", flush=True)
    return 0


def _run_tokenizer(step_dir: Path) -> Path:
    from gsa.checkpoint.state import read_config_json

    data = read_config_json(step_dir)["data"]
    return Path(next(iter(data["mixture"] or {data["data_dir"]: 1.0}))) / "tokenizer.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
