"""Fixed prompts that the model continues while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer

from gsa.generation import Sampling, generate
from training.data.dataset import PackedTokens
from training.engine.engine import Engine


@torch.no_grad()
def complete(
    engine: Engine, data: PackedTokens, prompts: Sequence[str], max_new_tokens: int, beat: Callable[[], None]
) -> list[tuple[str, str]]:
    """Each prompt with the text that the model adds, greedily, with the attention stage that the model is in.

    Every rank must call it: under ZeRO 3 every forward pass is a collective. The model is left in the mode (training
    or evaluation) in which it was found. beat: a sign of life, called before each prompt.
    """
    tokenizer = Tokenizer.from_file(str(data.tokenizer_file))
    was_training = engine.module.training
    engine.eval()
    greedy, found = Sampling(temperature=0.0), []
    for prompt in prompts:
        beat()
        tokens = tokenizer.encode(prompt, add_special_tokens=False).ids or [data.eod_id]
        # the model's vocabulary may be padded beyond the tokenizer's: those tokens have no text
        new = list(generate(engine.module, tokens, max_new_tokens=max_new_tokens, eod_id=data.eod_id, sampling=greedy))
        found.append((prompt, tokenizer.decode([token for token in new if token < data.vocab_size])))
    if was_training:
        engine.train()
    return found
