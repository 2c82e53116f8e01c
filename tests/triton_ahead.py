"""Compiles every Triton kernel for GPUs that are not here; prints registers, spills, shared memory as JSON lines.

    python tests/triton_ahead.py [80 89 90]

Run it without TRITON_INTERPRET. The sizes are those of a model with bf16, 16 query heads of 64, 4 key/value heads
and 4 indexer heads of 64; launch options are the ones that run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gsa.kernels import triton_alignment as alignment
from gsa.kernels import triton_attention as attention
from gsa.kernels import triton_select as selection

G, REP, D, J, E = 4, 4, 64, 4, 64
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BF16 = {"Q", "K", "V", "Out", "dOut", "dQ", "dK", "dV", "IndexQ", "IndexK"}
INT32 = {"Bits", "Begin", "Start", "Rows", "Last", "Kept"}
SCALES = {"scale", "index_scale", "to_level", "to_score"}


def kernels() -> Iterator[tuple[str, object, dict, dict]]:
    """(name, kernel, constants, launch options)."""
    index = {"J": J, "E": E}
    yield "level_strip", selection.level_strip, index, selection.SCORE
    launch = {"BLOCK": selection.block_of(2048), "num_warps": 8}
    for entropy in (False, True):
        yield (
            f"row_statistic {'entropy' if entropy else 'variance'}",
            selection.row_statistic,
            {"ENTROPY": entropy},
            launch,
        )
    yield "select_rows", selection.select_rows, {}, launch
    for bits in (True, False):
        shared = {"G": G, "D": D, "HAS_BITS": bits}
        tag = "bits" if bits else "all"
        tile = attention.tile_of(attention.FORWARD, REP)
        yield f"attend_forward {tag}", attention.attend_forward, shared | {"WITH_OUT": True}, tile
        if not bits:  # with bits the attention has come before, and left them
            yield "attend_forward, sums only", attention.attend_forward, shared | {"WITH_OUT": False}, tile
        tile = attention.tile_of(attention.BACKWARD_QUERIES, REP)
        yield f"attend_backward_queries {tag}", attention.attend_backward_queries, shared, tile
        tile = attention.tile_of(attention.BACKWARD_KEYS, REP)
        yield f"attend_backward_keys {tag}", attention.attend_backward_keys, shared, tile
        yield f"align_logits {tag}", alignment.align_logits, shared | index | {"REP": REP}, alignment.LOGITS
    yield "align_queries", alignment.align_queries, index, alignment.QUERIES
    yield "align_keys", alignment.align_keys, index, alignment.KEYS


def type_of(kernel: str, name: str) -> str:
    if name in SCALES:
        return "fp32"
    if name == "Strip":
        return "*u16"
    if name in INT32:
        return "*i32"
    if name in BF16:
        return "*bf16"
    # tensors have capital letters, or begin with d for a gradient; sizes are one letter, or end in 0
    if len(name) > 1 and (name[0].isupper() or re.match("d[A-Z]", name)):
        return "*fp32"
    if kernel == "level_strip" and name == "W":
        return "*fp32"
    return "i32"


def compile_for(name: str, kernel, constants: dict, launch: dict, arch: int) -> dict:
    constants = constants | {k: v for k, v in launch.items() if k.isupper()}
    options = {k: v for k, v in launch.items() if not k.isupper()}
    order = kernel.arg_names
    signature = {a: "constexpr" if a in constants else type_of(kernel.__name__, a) for a in order}
    if constants.get("HAS_BITS") is False:  # the pointer is None at launch
        signature["Bits"], constants = "constexpr", constants | {"Bits": None}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(order) if signature[a].startswith("*")}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(order.index(a),): v for a, v in constants.items()}, attrs=aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dumped = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dumped))
    ptx = compiled.asm["ptx"]
    return {
        "kernel": name, "arch": arch, "registers": int(used["REG"]), "spill_bytes": int(used["STACK"]) + int(used["LOCAL"]),
        "shared_kib": compiled.metadata.shared / 1024, "warps": options["num_warps"],
        "tensor_cores": "wgmma" if "wgmma" in ptx else "mma.sync" if "mma.sync" in ptx else "none",
    }  # fmt: skip


if __name__ == "__main__":
    for arch in [int(a) for a in sys.argv[1:]] or [80, 89, 90]:
        for spec in kernels():
            print(json.dumps(compile_for(*spec, arch)), flush=True)
