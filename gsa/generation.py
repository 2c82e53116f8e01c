"""Generation with a trained model: loading it from a checkpoint, sampling tokens, streaming their text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from gsa.attention.cache import Cache
from gsa.checkpoint import manifest
from gsa.checkpoint.state import CONFIG
from gsa.config import ModelConfig
from gsa.kernels.choice import Shape, resolve
from gsa.model import GSAForCausalLM, count_params
from gsa.weights import load_weights


def checkpoint_of(path: Path) -> Path:
    """`path` itself when it is the folder of a checkpoint, else the one that `latest` of the run folder `path` names.

    Raises CheckpointError when the run folder has none.
    """
    return path if path.name.startswith("step_") or (path / CONFIG).is_file() else manifest.resolve("latest", path)


def load_model(step_dir: Path, device: str = "cpu") -> GSAForCausalLM:
    """The model of a checkpoint folder, in float32 and evaluation mode, on `device`, with the fastest backend there.

    Prints a warning to stderr when Triton's kernels do not pass their check on a GPU and the chunked ones run instead.
    Raises CheckpointError when the weights are missing, changed or damaged, or their configuration describes no model.
    """
    config, weights = load_weights(step_dir)
    try:
        c = ModelConfig(**config)
    except (TypeError, ValueError) as err:
        raise manifest.CheckpointError(f"{step_dir}: its config.json describes no model: {err}; restore it") from err
    # counted before anything is allocated: the file may describe a model of any size
    described, there = count_params(c)["total"], sum({id(w): w.numel() for w in weights.values()}.values())
    if not 0 <= there - described <= len(weights):  # the state that is no parameter is a number per layer
        raise manifest.CheckpointError(
            f"{step_dir}: config.json describes {described:,} parameters, model.safetensors holds {there:,}; restore it"
        )
    model = GSAForCausalLM(c)
    try:
        model.load_state_dict(weights)
    except RuntimeError as err:
        raise manifest.CheckpointError(f"{step_dir}: its weights are not those of config.json: {err}") from err
    shape = Shape(c.n_heads, c.n_kv_heads, c.d_head, c.n_indexer_heads, c.d_indexer, torch.float32)
    backend, fault = resolve("auto", shape, torch.device(device))
    if fault is not None:
        print(f"warning: attention runs on the chunked kernels, not on Triton's: {fault}", file=sys.stderr)
    model.set_backend(backend)
    return model.float().eval().to(device)


def check_device(device: str) -> None:
    """Raises ValueError when torch does not see the device that the option --device names."""
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; leave it out")


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled. Raises ValueError, naming the option, for an impossible value.

    temperature: 0 is greedy. top_k: sample from this many likeliest tokens; 0: from all. top_p: sample from the fewest
    likeliest tokens that have this probability together; 1: from all.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"--temperature {self.temperature} must not be negative; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"--top_k {self.top_k} must not be negative; 0 samples from all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must be above 0 and at most 1; 1 samples from all tokens")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(V,) float32, the distribution to sample from, given logits (V,): top_k first, then top_p of what remains."""
        logits = logits.float()
        if self.temperature == 0:
            return F.one_hot(logits.argmax(), logits.numel()).float()
        logits = logits / self.temperature
        if 0 < self.top_k < logits.numel():
            top = logits.topk(self.top_k)  # by index: tokens that tie with the last one are not added
            logits = torch.full_like(logits, -torch.inf).scatter(0, top.indices, top.values)
        p = logits.softmax(-1)
        if self.top_p < 1:
            ranked, order = p.sort(descending=True, stable=True)
            # a token stays when those before it have less than top_p together; the likeliest always stays
            dropped = order[ranked.cumsum(0) - ranked >= self.top_p]
            p[dropped] = 0
            p /= p.sum()
        return p


@torch.no_grad()
def generate(
    model: GSAForCausalLM, tokens: list[int], *, max_new_tokens: int, eod_id: int, sampling: Sampling
) -> Iterator[int]:
    """Yields the tokens that continue `tokens` (at least one), one at a time; stops before eod_id.

    The same seed gives the same tokens. Keys, values and indexer keys of past tokens are cached. When the sequence
    reaches the model's max_position_embeddings, its oldest quarter is dropped and the rest is read again.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(model.parameters()).device
    window = model.config.max_position_embeddings
    capacity = min(window, len(tokens) + max_new_tokens)
    text = list(tokens)
    new = text[-window:]
    cache = _empty_cache(model, capacity)
    for _ in range(max_new_tokens):
        if cache.length + len(new) > capacity:
            cache = _empty_cache(model, capacity)
            new = text[-(window - window // 4) :]
        logits = model(torch.tensor([new], device=device), cache=cache, last_only=True).logits[0, -1].cpu()
        token = int(torch.multinomial(sampling.probabilities(logits), 1, generator=generator))
        if token == eod_id:
            return
        yield token
        text.append(token)
        new = [token]


def _empty_cache(model: GSAForCausalLM, capacity: int) -> Cache:
    weight = model.embed.weight
    return Cache(model.config, 1, capacity, weight.dtype, weight.device)


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Yields the text of `tokens` as they come; a character of several tokens comes whole, with its last token."""
    ids: list[int] = []
    sent = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd") and text != sent:
            yield text[len(sent) :]
            sent = text
    rest = tokenizer.decode(ids)[len(sent) :]
    if rest:
        yield rest
