"""Runs training/train.py with another attention layer, for comparison.

    python -m benchmarks.layers naive_gather|flash <arguments of training/train.py>

`naive_gather` computes attention as the legacy layer did: the whole score matrix, the top k_base keys of each row, and
a copy of their keys and values for every query. It replaces selection and attention only; the alignment loss, which the
legacy layer did not have, stays. It needs model.adaptive_k=off. `flash` is torch's fused dense attention, for
model.sparse=false. The trainer's own kernel also separates the documents of a window; `flash` does not, so it is
correct only when every window is a single document, and refuses other data.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from gsa import kernels
from training import train
from training.engine.world import exit_process

Layer = Literal["naive_gather", "flash"]


@contextmanager
def layer(name: Layer) -> Iterator[None]:
    """Within this context, models run with this layer."""
    if name == "flash":
        with patch.object(kernels, "attend", _Flash().attend):
            yield
        return
    naive = _NaiveGather()
    with patch.object(kernels, "select", naive.select), patch.object(kernels, "attend", naive.attend):
        yield


class _NaiveGather:
    """Replaces kernels.select and kernels.attend, which a layer calls in this order."""

    @torch.no_grad()
    def select(
        self,
        backend: kernels.Backend,
        index: kernels.Index,
        alpha: Tensor,
        v_ref: Tensor,
        doc_start: Tensor | None,
        rule: kernels.SelectionRule,
    ) -> kernels.Selection:
        if rule.mode != "off":
            raise ValueError(f"the naive gather takes k_base keys per query; set model.adaptive_k=off, not {rule.mode}")
        visible = kernels.visible_keys(doc_start)
        scores = kernels.index_scores(*index).masked_fill(~visible, -torch.inf)
        self._best = scores.topk(min(rule.k_base, scores.shape[-1]), -1)
        chosen = torch.zeros_like(visible).scatter_(-1, self._best.indices, True) & visible
        # only the alignment loss reads the packed bits
        return kernels.Selection(kernels.pack(chosen), chosen.sum(-1), None)

    def attend(
        self, backend: kernels.Backend, q: Tensor, k: Tensor, v: Tensor, bits: Tensor, doc_start: Tensor | None
    ) -> tuple[Tensor, None]:
        B, T, H, D = q.shape
        hidden = self._best.values.isinf()[:, :, None]
        heads = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
        every = self._best.indices[..., None, None].expand(-1, -1, -1, H, D)
        keys, values = (x[:, None].expand(-1, T, -1, -1, -1).gather(2, every) for x in heads)
        logits = torch.einsum("bthd,btkhd->bthk", q, keys) / math.sqrt(D)
        p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bthk,btkhd->bthd", p, values), None


class _Flash:
    """Replaces kernels.attend."""

    def __init__(self) -> None:
        self._started = False

    def attend(
        self, backend: kernels.Backend, q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None, doc_start: Tensor | None
    ) -> tuple[Tensor, None]:
        if bits is not None:
            raise ValueError("flash attention is dense; set model.sparse=false")
        if not self._started and doc_start.any():  # only once: it makes the host wait for the device
            raise ValueError("flash attention would join the documents of a window; prepare one document per window")
        self._started = True
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2), None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.layers",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layer", choices=get_args(Layer))
    args, rest = parser.parse_known_args(argv)
    with layer(args.layer):
        return train.main(rest)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
