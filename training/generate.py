"""Continues prompts with a trained model: `python -m training.generate RUN --prompt "def main("`.

The text is printed as it is generated. RUN is a run's folder, whose latest checkpoint is used, or a step_N folder,
which needs nothing else: it carries its tokenizer. A tokenizer that is not the model's is refused.
Exit codes: 0 done; 2 refused argument; 3 refused checkpoint, or a missing or another tokenizer; 1 anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gsa.generation import Sampling, check_device, checkpoint_of, generate, load_model, stream_text
from training.checkpointing.tokenizer import load_tokenizer
from training.config.command import add_run, command_parser, run_command
from training.config.exit_codes import ExitCode, Refusal


def main(argv: Sequence[str]) -> int:
    parser = command_parser("generate", __doc__)
    add_run(parser, "the folder of a run or of a checkpoint, e.g. outputs/quickstart or outputs/quickstart/step_300")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="a tokenizer.json, which must be the model's (default: the checkpoint's, or that of the run's data)",
    )
    parser.add_argument("--max_new_tokens", type=int, default=48, help="tokens per prompt (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    parser.add_argument(
        "--top_k", type=int, default=40, help="sample from the k likeliest tokens, 0: from all (default: %(default)s)"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample from the likeliest tokens with this probability (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        if args.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
        if not all(args.prompt):
            raise ValueError("--prompt is empty; give at least one character")
        check_device(args.device)
    except ValueError as err:
        raise Refusal(str(err)) from err
    step_dir = checkpoint_of(args.run)
    model = load_model(step_dir, args.device)
    loaded = load_tokenizer(step_dir, args.tokenizer, model_vocab_size=model.config.vocab_size)
    if loaded.warning is not None:
        print(f"warning: {loaded.warning}", file=sys.stderr)
    for prompt in args.prompt:
        print(prompt, end="", flush=True)
        new = generate(
            model,
            loaded.tokenizer.encode(prompt, add_special_tokens=False).ids,
            max_new_tokens=args.max_new_tokens,
            eod_id=loaded.eod_id,
            sampling=sampling,
        )
        for text in stream_text(loaded.tokenizer, new):
            print(text, end="", flush=True)
        print("\n", flush=True)
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(run_command(main))
