"""The operations of the layer: tensors and numbers in, tensors out. `reference` defines what is right.

Letters as in docs/gsa.md: B batch, T queries, S keys, H query heads, G key/value heads, D head width, J and
E the indexer's heads and width. One backend exists; a faster one implements the same signatures.
"""

from gsa.kernels.reference import (
    alignment_kl,
    attend,
    index_scores,
    score_entropy,
    score_variance,
    select,
    visible,
)

__all__ = ["alignment_kl", "attend", "index_scores", "score_entropy", "score_variance", "select", "visible"]
