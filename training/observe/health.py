"""The metrics of a row that come from probes of attention, and from the sizes of gradients and updates."""

from __future__ import annotations

import math

import torch

from gsa.attention.probe import PROBES
from training.engine.zero_internals import PARTS, UPDATED


def probe_metrics(sums: torch.Tensor, counts: torch.Tensor) -> dict[str, object]:
    """The row's PROBE_METRICS from sums over ranks, and how many ranks had each, (n_layers, len(PROBES)) twice.

    A rank whose sequence has nothing to measure in a layer counts for nothing there; what no layer has is left out.
    """
    by_name = dict(zip(PROBES, (sums / counts).cpu().unbind(1), strict=True))
    found = {
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
    return {name: value.item() for name, value in found.items() if value.isfinite()} | {"layers": layers}


def health_metrics(squares: torch.Tensor | None, updates: torch.Tensor) -> dict[str, float]:
    """HEALTH_METRICS of the row. squares: by part; updates: by group; both summed over ranks."""
    row = {}
    if squares is not None:
        row |= {f"grad_norm/{part}": math.sqrt(square) for part, square in zip(PARTS, squares.tolist(), strict=True)}
    for name, (change, weight) in zip(UPDATED, updates.tolist(), strict=True):
        if weight > 0:
            row[f"update_ratio/{name}"] = math.sqrt(change / weight)
    return row
