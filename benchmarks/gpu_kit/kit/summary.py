"""Prints speed, memory, saves and the replay from a run's metrics.jsonl: python summary.py RUN_FOLDER"""

import json
import sys
from pathlib import Path
from statistics import median

rows = [json.loads(line) for line in (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()]
steps = [r for r in rows if "loss" in r]
calm = [r for r in steps if 4 <= r["step"] <= 8] or steps
for r in steps:
    print(
        f"step {r['step']:3d} {r['stage']:<6} {r['seconds']:.3f} s, loss {r['loss']:.5f}, norm {r['grad_norm']:.4f}, "
        f"keys {r['selected_k']:.1f}, mfu {r['mfu']:.3f}, "
        + ", ".join(
            f"{k.removeprefix('seconds_')} {r[k]:.3f}"
            for k in r
            if k.startswith("seconds_") and isinstance(r[k], float)
        )
        + "".join(f", {k.split('/')[-1]} {r[k]:.2f}" for k in r if k.startswith("gpu/0/") and isinstance(r[k], float))
    )
for name in ("seconds", "tokens_per_s", "mfu", "memory_gib", "gpu/0/utilisation", "gpu/0/power_w", "gpu/0/throttled"):
    found = [r[name] for r in calm if name in r]
    if found:
        print(f"median of steps 4 to 8, {name}: {median(found):.4g}")
for r in rows:
    if r.get("event") in ("device", "predicted", "save", "receipt", "error", "stop", "spike"):
        print({k: v for k, v in r.items() if k not in ("time", "config")})
