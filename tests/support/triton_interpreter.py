"""Triton on the machine at hand: its interpreter where there is no GPU. Import before anything else imports triton.

The interpreter runs a kernel's programs one after another in numpy. Its products of bf16 matrices multiply the raw
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
    # the mode is fixed when a kernel is defined; what is started from here must not inherit it
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import numpy as np

        with suppress(ImportError):  # imported at the first launch otherwise, in the other mode
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

        # What follows makes it two to four times as fast. It checks every integer sum for overflow, in 64 bits, as no
        # GPU does; and at every call within a kernel it puts its own in place of all of triton.language again.
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
        replace_language, replaced = interpreter._patch_lang, set()

        def replace_once(function):
            if id(function.__globals__) not in replaced:
                replaced.add(id(function.__globals__))
                return replace_language(function)

        interpreter._patch_lang = replace_once

        # CPython keeps frames in chunks of 16 KB, and maps and unmaps one for every call made just at the end of
        # another. A frame of 9000 variables, 72 KB, gets 128 KB, and leaves the rest to all that a kernel calls.
        scope: dict = {}
        exec(f"def roomy(f, x, y):\n    return f(*x, **y)\n    {' = '.join(f'v{i}' for i in range(9000))} = 0", scope)
        launch = interpreter.GridExecutor.__call__

        def launch_with_room(*args, **kwargs):
            replaced.clear()  # the launch before has put triton.language back
            return scope["roomy"](launch, args, kwargs)

        interpreter.GridExecutor.__call__ = launch_with_room
    finally:
        del os.environ["TRITON_INTERPRET"]

from gsa.kernels import triton_alignment, triton_attention, triton_select  # noqa: E402  in the mode set above


def small_tiles(patch: pytest.MonkeyPatch, rows: int = 32, block: int = 32, strip: int = 5) -> None:
    """Tiles, blocks and strips so small that short sequences have several, and ragged ones.

    rows: of attention. block: keys that selection reads at a time. strip: sampled queries of the alignment loss.
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
    """Fresh memory holds NaN, or -1: what a kernel reads and nobody wrote shows."""

    def filled(make):
        def fresh(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else -1 if made.dtype.is_signed else 7)

        return fresh

    for name in ("empty", "empty_like"):
        patch.setattr(torch, name, filled(getattr(torch, name)))


def rewritten(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """A copy of a module of kernels whose source says something else; each change is (what is there once, instead)."""
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
