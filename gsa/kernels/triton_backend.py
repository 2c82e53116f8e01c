"""The operations in Triton, for GPUs. Signatures and shapes are those of gsa/kernels/__init__.py.

Which shapes they can run: gsa/kernels/choice.py.
"""

from __future__ import annotations

import torch.nn.functional as F

from gsa.kernels.triton_alignment import alignment_kl
from gsa.kernels.triton_attention import Attend
from gsa.kernels.triton_feed_forward import silu_product
from gsa.kernels.triton_loss import fold_logits, logits_gradient
from gsa.kernels.triton_select import select

__all__ = ["alignment_kl", "attend", "fold_logits", "logits_gradient", "select", "silu_product"]


def attend(q, k, v, bits, doc_start):
    T, S = q.shape[1], k.shape[1]
    if bits is None and doc_start is None and T in (1, S):
        causal = T > 1  # one query sees every key
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2), None
    return Attend.apply(q, k, v, bits, doc_start)
