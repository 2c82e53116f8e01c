"""Continues a prompt with a trained model: `python -m training.generate outputs/quickstart --prompt "def "`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from gsa import GSAForCausalLM, ModelConfig
from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError
from gsa.weights import load_weights


def load_model(step_dir: Path) -> GSAForCausalLM:
    """The model of a checkpoint folder, in evaluation mode, float32, on the CPU."""
    config, weights = load_weights(step_dir)
    model = GSAForCausalLM(ModelConfig(**config))
    model.load_state_dict(weights)
    return model.float().eval()


@torch.no_grad()
def generate(
    model: GSAForCausalLM, tokens: list[int], *, max_new_tokens: int, eod_id: int, temperature: float = 1.0,
    top_k: int = 0, seed: int = 0,
) -> list[int]:  # fmt: skip
    """Continues `tokens` (at least one) and returns the new ones, ending before eod_id.

    temperature 0 takes the likeliest token; top_k 0 keeps all candidates. The oldest tokens fall out of
    view beyond max_position_embeddings. Same seed, same text.
    """
    generator = torch.Generator().manual_seed(seed)
    window = model.config.max_position_embeddings
    out = list(tokens)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([out[-window:]])).logits[0, -1].float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            logits = logits / temperature
            if top_k:
                logits[logits < logits.topk(min(top_k, logits.numel())).values[-1]] = -torch.inf
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        if token == eod_id:
            break
        out.append(token)
    return out[len(tokens) :]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="training.generate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder (its latest checkpoint) or a step_N folder")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: that of the run's data)")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=40, help="candidates kept, 0 all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        step_dir = args.run if args.run.name.startswith("step_") else manifest.resolve("latest", args.run)
        model = load_model(step_dir)
        path = args.tokenizer or _run_tokenizer(step_dir)
        if not path.exists():
            raise CheckpointError(f"no tokenizer at {path}; name one with --tokenizer")
    except CheckpointError as err:
        print(f"error: {err}", file=sys.stderr)
        return 3
    tokenizer = Tokenizer.from_file(str(path))
    eod_id = tokenizer.token_to_id("<|endoftext|>")
    for prompt in args.prompt:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        if not ids:
            print("error: --prompt is empty; give at least one character", file=sys.stderr)
            return 2
        new = generate(
            model, ids, max_new_tokens=args.max_new_tokens, eod_id=-1 if eod_id is None else eod_id,
            temperature=args.temperature, top_k=args.top_k, seed=args.seed,
        )  # fmt: skip
        print(f"{prompt}{tokenizer.decode(new)}\n", flush=True)
    return 0


def _run_tokenizer(step_dir: Path) -> Path:
    from gsa.checkpoint.state import read_config_json

    data = read_config_json(step_dir)["data"]
    return Path(next(iter(data["mixture"] or {data["data_dir"]: 1.0}))) / "tokenizer.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
