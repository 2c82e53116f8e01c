"""Fixed prompts that the model continues while it trains."""

from __future__ import annotations

import torch

from gsa.generation import Sampling, generate
from training.data.dataset import PackedTokens
from training.engine.engine import Engine


@torch.no_grad()
def complete(engine: Engine, data: PackedTokens, prompt: str, max_new_tokens: int) -> str:
    """The text that the model adds to `prompt`, greedily, with the attention stage that the model is in.

    Every rank must call it: under ZeRO 3 every forward pass is a collective. The model is left in the mode (training
    or evaluation) in which it was found.
    """
    tokenizer = data.load_tokenizer()
    was_training = engine.module.training
    engine.eval()
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids or [data.eod_id]
    greedy = Sampling(temperature=0.0)
    new = generate(engine.module, tokens, max_new_tokens=max_new_tokens, eod_id=data.eod_id, sampling=greedy)
    # the model's vocabulary may be padded beyond the tokenizer's: those tokens have no text
    text = tokenizer.decode([token for token in new if token < data.vocab_size])
    if was_training:
        engine.train()
    return text
