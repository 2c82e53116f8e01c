"""Triton on the machine at hand: its interpreter where there is no GPU. Import before anything else imports triton.

The interpreter runs a kernel's programs one after another in numpy. Its products of bf16 matrices multiply the raw
bits (triton 3.6 to 3.9), so operands are widened first.
"""

from __future__ import annotations

import os
from contextlib import suppress

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
    finally:
        del os.environ["TRITON_INTERPRET"]
