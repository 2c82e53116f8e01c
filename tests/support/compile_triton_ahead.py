"""Compiles Triton kernels for GPUs that this machine need not have; prints registers, spills, shared memory as JSON.

    PYTHONPATH=. python tests/support/compile_triton_ahead.py [80 89 90 | ARCH:SIZES ...]

Run it without TRITON_INTERPRET. SIZES is a name in SIZES, by default "model": 16 query heads of 64, 4 key/value heads
and 4 indexer heads of 64, in bf16. Launch options are those of a real launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gsa.kernels import triton_alignment as alignment
from gsa.kernels import triton_attention as attention
from gsa.kernels import triton_feed_forward as feed_forward
from gsa.kernels import triton_loss as loss
from gsa.kernels import triton_select as selection


@dataclass(frozen=True)
class Sizes:
    """Width of the heads (D) and of the indexer's heads (E), and their dtype."""

    D: int = 64
    E: int = 64
    dtype: str = "bf16"

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else 4


SIZES = {"model": Sizes(), "wide": Sizes(D=128, E=128), "float32": Sizes(dtype="fp32")}
"""The sizes of the model, and the widest that gsa/kernels/choice.py accepts in each dtype."""
G, REP, J = 4, 4, 4
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OF_THE_MODEL = {"Q", "K", "V", "Out", "dOut", "dQ", "dK", "dV", "IndexQ", "IndexK", "Gate", "Up", "dGate", "dUp"}
INT32 = {"Bits", "Begin", "Start", "Rows", "Last", "Wanted"}
SCALES = {"scale", "index_scale", "to_level", "to_score"}

Spec = tuple[str, object, dict, dict]
"""Name, kernel, constants, launch options."""


def kernels(sizes: Sizes) -> Iterator[Spec]:
    """All kernels for "model"; for other sizes those whose tiles depend on width and dtype, reading bits."""
    index = {"J": J, "E": sizes.E}
    whole = sizes == SIZES["model"]
    yield "level_strip", selection.level_strip, index, attention.fitted(selection.SCORE, sizes.E, sizes.itemsize)
    if whole:
        launch = {"BLOCK": selection.block_of(2048), "num_warps": 8}
        for mode in ("variance", "entropy"):
            yield f"row_statistic {mode}", selection.row_statistic, {"ENTROPY": mode == "entropy"}, launch
        yield "select_rows", selection.select_rows, {}, launch
        for kernel in (loss.fold_rows, loss.gradient_rows):
            yield kernel.__name__, kernel, {}, {"BLOCK": loss.BLOCK} | loss.OPTIONS
        for kernel in (feed_forward.silu_forward, feed_forward.silu_backward):
            yield kernel.__name__, kernel, {}, {"BLOCK": feed_forward.BLOCK} | feed_forward.OPTIONS
    for bits in (True, False) if whole else (True,):
        yield from _attention_kernels(sizes, bits)
        if sizes.dtype == "bf16":  # in float32 it compiles slowly, and needs less memory than attention
            tile = alignment.logits_options(sizes.itemsize)
            shared = {"G": G, "D": sizes.D, "REP": REP, "HAS_BITS": bits}
            yield f"align_logits {'bits' if bits else 'all'}", alignment.align_logits, shared | index, tile
    queries, keys = (attention.fitted(s, sizes.E, sizes.itemsize) for s in (alignment.QUERIES, alignment.KEYS))
    yield "align_queries", alignment.align_queries, index, queries
    if sizes.dtype == "bf16":
        yield "align_keys", alignment.align_keys, index, keys


def _attention_kernels(sizes: Sizes, bits: bool) -> Iterator[Spec]:
    shared = {"G": G, "D": sizes.D, "HAS_BITS": bits}
    tag = "bits" if bits else "all"

    def tile(setting: dict) -> dict:
        return attention.tile_of(setting, REP, sizes.D, sizes.itemsize)

    yield f"attend_forward {tag}", attention.attend_forward, shared | {"WITH_OUT": True}, tile(attention.FORWARD)
    if not bits:  # with bits, attention has computed the sums before
        only = shared | {"WITH_OUT": False}
        yield "attend_forward, sums only", attention.attend_forward, only, tile(attention.FORWARD)
    queries, keys = tile(attention.BACKWARD_QUERIES), tile(attention.BACKWARD_KEYS)
    yield f"attend_backward_queries {tag}", attention.attend_backward_queries, shared, queries
    yield f"attend_backward_keys {tag}", attention.attend_backward_keys, shared, keys


def type_of(kernel: str, name: str, dtype: str) -> str:
    """The type of a kernel's argument at launch."""
    if name in SCALES:
        return "fp32"
    if name == "Strip":
        return "*u16"
    if name == "Targets":
        return "*i64"
    if name in INT32:
        return "*i32"
    if (kernel, name) in {("level_strip", "W"), ("row_statistic", "Out")}:
        return "*fp32"
    if name in OF_THE_MODEL:
        return f"*{dtype}"
    # tensors begin with a capital letter, or with d and a capital for a gradient; sizes are one letter or end in 0
    if len(name) > 1 and (name[0].isupper() or re.match("d[A-Z]", name)):
        return "*fp32"
    return "i32"


def compile_for(spec: Spec, arch: int, sizes: str) -> dict:
    name, kernel, constants, launch = spec
    constants = constants | {k: v for k, v in launch.items() if k.isupper()}
    options = {k: v for k, v in launch.items() if not k.isupper()}
    order = kernel.arg_names
    dtype = SIZES[sizes].dtype
    signature = {a: "constexpr" if a in constants else type_of(kernel.__name__, a, dtype) for a in order}
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
        "kernel": name,
        "arch": arch,
        "sizes": sizes,
        "registers": int(used["REG"]),
        "spill_bytes": int(used["STACK"]) + int(used["LOCAL"]),
        "shared_kib": compiled.metadata.shared / 1024,
        "warps": options["num_warps"],
        "tensor_cores": "wgmma" if "wgmma" in ptx else "mma.sync" if "mma.sync" in ptx else "none",
    }


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["80", "89", "90"]:
        arch, _, sizes = wanted.partition(":")
        for spec in kernels(SIZES[sizes or "model"]):
            print(json.dumps(compile_for(spec, int(arch), sizes or "model")), flush=True)
