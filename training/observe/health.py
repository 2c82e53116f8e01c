"""Turns sums over ranks into the fields of a step row: probes of attention, gradient norms, relative updates."""

from __future__ import annotations

import math

import torch

from gsa.attention.probe import PROBES
from training.engine.zero_internals import PARTS, UPDATED


def probe_metrics(sums: torch.Tensor, counts: torch.Tensor) -> dict[str, object]:
    """The row's PROBE_METRICS (training/record/metric_schema.py).

    sums, counts: (n_layers, len(PROBES)), the sum over the ranks that measured a probe in a layer, and their number; a
    rank whose sequence has nothing to measure there is in neither. Means leave out layers that no rank measured, which
    are None in "layers"; a metric that no layer has is left out.
    """
    by_name = dict(zip(PROBES, (sums / counts).cpu().unbind(1), strict=True))
    means = {
        "indexer/coverage": by_name["coverage"].nanmean(),
        "indexer/coverage_worst": by_name["coverage"].nan_to_num(torch.inf).min(),
        "indexer/oracle": by_name["oracle"].nanmean(),
        "indexer/recall": by_name["recall"].nanmean(),
        "gate/value_saturation": by_name["value_saturation"].nanmean(),
        "gate/output_saturation": by_name["output_saturation"].nanmean(),
        "attention/first_token": by_name["first_token"].nanmean(),
    }
    layers = {
        name: [value if math.isfinite(value) else None for value in column.tolist()] for name, column in by_name.items()
    }
    return {name: value.item() for name, value in means.items() if value.isfinite()} | {"layers": layers}


def health_metrics(squares: torch.Tensor | None, updates: torch.Tensor) -> dict[str, float]:
    """The row's HEALTH_METRICS (training/record/metric_schema.py), from sums over ranks.

    squares: (len(PARTS),), the squared gradient of each part, or None where gradients are offloaded. updates:
    (len(UPDATED), 2), the squared change and the squared weights of each group of matrices.
    """
    row = {}
    if squares is not None:
        row |= {f"grad_norm/{part}": math.sqrt(square) for part, square in zip(PARTS, squares.tolist(), strict=True)}
    for name, (change, weight) in zip(UPDATED, updates.tolist(), strict=True):
        if weight > 0:
            row[f"update_ratio/{name}"] = math.sqrt(change / weight)
    return row
