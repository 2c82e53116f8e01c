"""The identities of docs/gsa.md, 9, for models on the Triton backend, and wrong layers on which they fail.

They run on a GPU or under Triton's interpreter: see test_triton.py. tests/gsa/test_identities.py has the other backends.
"""

from __future__ import annotations

from support import triton_interpreter  # isort: skip  before anything imports triton

import pytest
import torch
from support import kernel_contract as checks
from support.kernel_contract import KINDS, WRONG, Way, at_random_sizes, check_is_caught, one_thread  # noqa: F401

from gsa.kernels import triton_backend

# in the interpreter a forward pass of one layer takes a third of a second, mostly for selection
WAY = Way("triton", triton_backend, torch.float32, triton_interpreter.DEVICE, bound=1e-4, n_layers=1, examples=2)


@pytest.fixture(autouse=True)
def small_tiles_and_garbage(monkeypatch):
    triton_interpreter.small_tiles(monkeypatch, rows=64, block=64, strip=24)
    triton_interpreter.garbage(monkeypatch)


@pytest.mark.parametrize("mode, group, tied", KINDS)
@pytest.mark.parametrize(
    "check, examples",
    [
        (checks.check_no_future, 2),
        (checks.check_rows_are_alone, 1),
        (checks.check_documents_are_alone, 2),
        (checks.check_open_gates, 1),
        (checks.check_decoding, 1),
    ],
)
def test_identity(check, examples, mode, group, tied):
    at_random_sizes(check, WAY, mode, group, tied, examples=examples)


@pytest.mark.parametrize(
    "check",
    [
        checks.check_all_keys_are_dense_attention,
        checks.check_who_learns_from_what,
        checks.check_as_the_reference,
        checks.check_recomputing,
    ],
)
@pytest.mark.parametrize("kind, stage", [*((kind, "sparse") for kind in KINDS), (KINDS[1], "dense")])
def test_identity_in_either_stage(check, kind, stage):
    at_random_sizes(lambda way, size: check(way, size, stage), WAY, *kind, examples=1)


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_layer_is_caught(fault):
    check_is_caught(fault, WAY)
