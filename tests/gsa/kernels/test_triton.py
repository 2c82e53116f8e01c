"""The Triton backend's operations against the float64 reference, and wrong kernels that the checks catch.

They run on a GPU when there is one, otherwise under Triton's interpreter. It runs programs one after another, so it shows
neither speed nor races between the warps of a program.
"""

from __future__ import annotations

from support import triton_interpreter  # isort: skip  before anything imports triton

import pytest
import torch
from hypothesis import given
from support.kernel_contract import GROUPS, Case, cases, check_attention, check_selection, one_thread, trials  # noqa: F401

from gsa.kernels import triton_alignment, triton_attention, triton_select

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = (torch.float32, torch.bfloat16)
DEVICE = triton_interpreter.DEVICE


@pytest.fixture(autouse=True)
def garbage(monkeypatch):
    triton_interpreter.garbage(monkeypatch)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if "shipped_tiles" not in request.keywords:
        triton_interpreter.small_tiles(monkeypatch)


@trials(8)
@given(case=cases(DTYPES, DEVICE))
def test_sets_equal_the_reference(case):
    check_selection("triton", case)


@trials(8)
@given(case=cases(DTYPES, DEVICE))
def test_outputs_and_every_gradient_equal_the_reference(case):
    check_attention("triton", case, BOUNDS[case.dtype])


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_size_with_packed_documents_and_ties(group):
    """T, S and k give several tiles, blocks of keys and strips, and k << T."""
    mode, dtype = ("off", "variance", "entropy", "variance")[GROUPS.index(group)], DTYPES[GROUPS.index(group) % 2]
    case = Case(B=1, T=41, S=48, H=8, G=8 // group, k=5, documents=3, tied=True, mode=mode, dtype=dtype, device=DEVICE)
    check_selection("triton", case)
    check_attention("triton", case, BOUNDS[dtype])


@pytest.mark.shipped_tiles
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shipped_tiles_and_heads_of_64(dtype):
    case = Case(
        B=1, T=80, S=150, H=8, G=2, D=64, J=4, E=64, k=20, documents=3, mode="variance", dtype=dtype, device=DEVICE
    )
    check_selection("triton", case)
    check_attention("triton", case, BOUNDS[dtype])


@pytest.mark.shipped_tiles
def test_the_widest_heads():
    """128 in bf16, where tiles have fewer rows."""
    case = Case(B=1, T=40, S=70, H=4, G=1, D=128, J=2, E=128, k=10, documents=2, dtype=torch.bfloat16, device=DEVICE)
    check_selection("triton", case)
    check_attention("triton", case, BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("documents", [1, 3])
def test_without_bits_every_visible_key_is_attended(documents):
    check_attention("triton", Case(k=40, documents=documents, dtype=torch.float32, device=DEVICE), 1e-5)


def test_selecting_all_keys_computes_the_statistic_only(monkeypatch):
    """As in the dense stage of adaptive_k=variance, which needs the statistic but no sets."""
    launched = []
    honest = triton_select.select_rows
    monkeypatch.setattr(triton_select, "select_rows", _Launches(honest, launched))
    case = Case(B=1, T=20, S=20, k=40, mode="variance", documents=2, dtype=torch.float32, device=DEVICE)
    assert check_selection("triton", case).bits is None and not launched
    assert check_selection("triton", Case(B=1, T=20, S=20, dtype=torch.float32, device=DEVICE)).bits is not None
    assert launched


class _Launches:
    """Stands in for a kernel: launches it with the arguments that `change` returns for the right ones."""

    def __init__(self, kernel, record: list | None = None, change=lambda args: args) -> None:
        self.kernel, self.record, self.change = kernel, record, change

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            if self.record is not None:
                self.record.append(grid)
            return self.kernel[grid](*self.change(list(args)), **kwargs)

        return launch


def scaled(i: int, by: float):
    def change(args):
        args[i] = args[i] * by
        return args

    return change


@pytest.mark.parametrize(
    "module, name, change",
    [
        (triton_attention, "attend_forward", scaled(-1, 1.01)),
        (triton_attention, "attend_backward_queries", scaled(5, 0.9)),
        (triton_attention, "attend_backward_keys", lambda a: [*a[:8], a[8] * 0 + 16, *a[9:]]),
        (triton_alignment, "align_logits", scaled(7, 1.1)),
        (triton_alignment, "align_queries", scaled(2, 0.9)),
        (triton_alignment, "align_keys", scaled(-1, 1.01)),
    ],
)
def test_a_wrong_kernel_is_caught(monkeypatch, module, name, change):
    monkeypatch.setattr(module, name, _Launches(getattr(module, name), change=change))
    with pytest.raises(AssertionError):
        check_attention("triton", Case(B=1, dtype=torch.float32, device=DEVICE), BOUNDS[torch.float32])


def test_reading_unwritten_memory_is_caught(monkeypatch, tmp_path):
    """The gradient by the logits is written where keys are visible: early queries have none at late keys."""
    wrong = triton_interpreter.rewritten(
        triton_alignment,
        tmp_path,
        ("n[:, None], mask=visible, other=0.0)", "n[:, None], mask=ok[None, :] & n_ok[:, None])"),
    )
    monkeypatch.setattr(triton_alignment, "align_keys", wrong.align_keys)
    with pytest.raises(AssertionError, match="index k: nan"):
        check_attention("triton", Case(B=1, dtype=torch.float32, device=DEVICE), BOUNDS[torch.float32])


SELECTION = Case(B=1, T=40, S=40, k=8, documents=2, mode="variance", dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("level_strip", scaled(-2, 0.9), "the statistic is wrong"),
        ("select_rows", lambda a: [a[0], a[1], a[2] - 1, *a[3:]], "the size it claims"),
        ("select_rows", lambda a: [a[0], a[1] * 0, *a[2:]], "a hidden key"),
        ("row_statistic", scaled(-1, 1.01), "the statistic is wrong"),
    ],
)
def test_a_wrong_selection_is_caught(monkeypatch, name, change, says):
    monkeypatch.setattr(triton_select, name, _Launches(getattr(triton_select, name), change=change))
    with pytest.raises(AssertionError, match=says):
        check_selection("triton", SELECTION)


OLDEST_FIRST = (("block = blocks - 1 - i", "block = i"), ("tl.cumsum(equal, 0, reverse=True)", "tl.cumsum(equal, 0)"))


@pytest.mark.parametrize(
    "changes, says",
    [
        (OLDEST_FIRST, "not that of the reference"),
        ([("(equal == 1) & (rank <= ties)", "(equal == 1) & (rank <= ties + 1)")], "the size it claims"),
        ([("met += tl.sum(equal, 0)", "met += 0")], "the size it claims"),  # ties of another block of keys
    ],
)
def test_wrong_ties_are_caught(monkeypatch, tmp_path, changes, says):
    case = Case(B=1, T=48, S=48, k=8, tied=True, dtype=torch.float32, device=DEVICE)
    wrong = triton_interpreter.rewritten(triton_select, tmp_path, *changes)
    monkeypatch.setattr(triton_select, "select_rows", wrong.select_rows)
    with pytest.raises(AssertionError, match=says):
        check_selection("triton", case)
