"""Triton on any machine: its interpreter when there is no GPU. Import this before anything else imports triton.

The interpreter runs the programs of a kernel one after another in numpy. Its products of bf16 matrices multiply the raw
bits (triton 3.6 to 3.9), so operands are widened first.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    # triton reads the variable when a kernel is defined; child processes must not inherit it
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import numpy as np

        with suppress(ImportError):  # otherwise the first launch imports it, without the variable
            import triton.experimental.gluon  # noqa: F401
        import triton.language as tl
        from triton.runtime import interpreter

        import gsa.kernels.triton_backend  # noqa: F401

        honest = interpreter.InterpreterBuilder.create_dot

        def widened(handle):
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        def create_dot(self, a, b, *rest):
            return honest(self, widened(a), widened(b), *rest)

        interpreter.InterpreterBuilder.create_dot = create_dot

        # The rest makes the interpreter two to four times as fast. It would check every integer sum for overflow in 64
        # bits, which no GPU does, and patch all of triton.language again at every call within a kernel.
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
        replace_language, replaced = interpreter._patch_lang, set()

        def replace_once(function):
            if id(function.__globals__) not in replaced:
                replaced.add(id(function.__globals__))
                return replace_language(function)

        interpreter._patch_lang = replace_once

        # CPython allocates frames in chunks of 16 KB, and maps and unmaps a chunk for every call that begins at the end
        # of one. A frame of 9000 variables takes 72 KB of a chunk of 128 KB; the calls of a kernel fit into the rest.
        scope: dict = {}
        exec(f"def roomy(f, x, y):\n    return f(*x, **y)\n    {' = '.join(f'v{i}' for i in range(9000))} = 0", scope)
        launch = interpreter.GridExecutor.__call__

        def launch_with_room(*args, **kwargs):
            replaced.clear()  # the previous launch has restored triton.language
            return scope["roomy"](launch, args, kwargs)

        interpreter.GridExecutor.__call__ = launch_with_room
    finally:
        del os.environ["TRITON_INTERPRET"]

from gsa.kernels import triton_alignment, triton_attention, triton_select  # noqa: E402  in the mode set above


def small_tiles(patch: pytest.MonkeyPatch, rows: int = 32, block: int = 32, strip: int = 5) -> None:
    """Makes tiles, blocks and strips so small that short sequences have several, and incomplete ones.

    rows: of a program of attention. block: keys that selection reads at a time. strip: sampled queries of the alignment
    loss.
    """
    patch.setattr(triton_select, "STRIP", 16)
    patch.setattr(triton_alignment, "STRIP", strip)
    patch.setattr(triton_select, "SCORE", triton_select.SCORE | {"BM": 16, "BN": 32})
    patch.setattr(triton_select, "block_of", lambda S: block)
    for name in ("FORWARD", "BACKWARD_QUERIES", "BACKWARD_KEYS"):
        patch.setattr(triton_attention, name, getattr(triton_attention, name) | {"rows": rows, "BN": 32})
    for name in ("LOGITS", "QUERIES", "KEYS"):
        patch.setattr(triton_alignment, name, getattr(triton_alignment, name) | {"BM": 16, "BN": 32})


def garbage(patch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN or -1, so that reading what was never written shows."""

    def filled(make):
        def fresh(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else -1 if made.dtype.is_signed else 7)

        return fresh

    for name in ("empty", "empty_like"):
        patch.setattr(torch, name, filled(getattr(torch, name)))


def rewritten(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """A copy of a kernel module with changed source; each change is (text that occurs once, its replacement)."""
    source = Path(module.__file__).read_text()
    for there, instead in changes:
        assert source.count(there) == 1, there
        source = source.replace(there, instead)
    path = folder / f"wrong_{module.__name__.rpartition('.')[-1]}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    copy = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(copy)
    return copy
