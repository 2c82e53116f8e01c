"""Number of parameters, FLOPs, refused settings, and the loss head."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gsa import GSAForCausalLM, ModelConfig
from gsa import loss as loss_module
from gsa.loss import linear_cross_entropy
from gsa.model import count_params, flops_per_token

PRETRAIN = ModelConfig(
    d_model=1024, n_layers=26, n_heads=16, n_kv_heads=4, d_ffn=3072, vocab_size=151936, max_position_embeddings=2048
)


@pytest.mark.parametrize(
    "config",
    [
        PRETRAIN,
        replace(PRETRAIN, tie_embeddings=False),
        replace(PRETRAIN, sparse=False, value_gate=False),
        replace(PRETRAIN, d_head=32, output_gate=False),
    ],
)
def test_the_closed_form_counts_every_parameter(config):
    with torch.device("meta"):
        model = GSAForCausalLM(config)
    assert count_params(config)["total"] == sum(p.numel() for p in model.parameters())


def test_the_pretraining_model_has_511_9_million():
    assert count_params(PRETRAIN)["total"] == pytest.approx(511.9e6, rel=0.001)


def test_flops_count_sparse_attention_as_sparse():
    sparse, dense = (flops_per_token(replace(PRETRAIN, sparse=s), 2048) for s in (True, False))
    # 2048 keys, 512 selected: 44 % of the causal triangle
    assert sparse["attention"] / dense["attention"] == pytest.approx(0.4375, rel=0.01)
    assert dense["attention"] == pytest.approx(26 * 3 * 4 * 1024 * 1024.5)
    assert sparse["indexer"] > 0 and dense["indexer"] == 0
    assert flops_per_token(replace(PRETRAIN, k_base=4096, k_max=4096), 2048)["attention"] == pytest.approx(
        dense["attention"]
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_kv_heads": 3}, r"model.n_kv_heads=3 does not divide model.n_heads=16; choose one of \[1, 2, 4, 8, 16\]"),
        ({"n_heads": 24, "n_kv_heads": 4}, "model.n_heads=24 does not divide model.d_model=1024"),
        ({"d_head": 33}, "model.d_head=33 must be even"),
        ({"k_min": 600}, "model.k_min=600, model.k_base=512"),
        ({"adaptive_k": "on"}, "model.adaptive_k='on' is not one of off, variance, entropy"),
        ({"n_layers": 0}, "model.n_layers=0 must be above 0"),
        ({"adaptive_k_temperature": -1.0}, "must be at least 0"),
    ],
)
def test_impossible_shapes_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        # a fresh config: replace() would carry the worked-out d_head along
        ModelConfig(**{"d_model": 1024, "n_heads": 16, "n_kv_heads": 4, **changes})


def test_too_long_an_input_is_refused():
    model = GSAForCausalLM(
        ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ffn=16, vocab_size=7, max_position_embeddings=8)
    )
    with pytest.raises(ValueError, match="9 tokens are more than model.max_position_embeddings=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match='not "dense" or "sparse"'):
        model.set_stage("warm")


def problem(n=50, d=8, v=33, dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(n, d, dtype=dtype, requires_grad=True),
        torch.randn(v, d, dtype=dtype, requires_grad=True),
    )
    targets = torch.randint(0, v, (n,))
    targets[::7] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("columns", [1, 7, 33, 1000])
def test_the_loss_and_its_gradients_equal_the_plain_loss(columns, monkeypatch):
    hidden, weight, targets = problem()
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", columns * 50 * 8)
    ours = linear_cross_entropy(hidden, weight, targets, (targets >= 0).sum())
    plain = F.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(3 * ours, (hidden, weight)), torch.autograd.grad(3 * plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_in_float32_the_loss_is_as_accurate_as_the_plain_loss():
    hidden, weight, targets = problem(300, 64, 5000, torch.float32)
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets)
    wanted = torch.autograd.grad(exact, (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, targets, (targets >= 0).sum())
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)
    for mine, theirs in zip(torch.autograd.grad(ours, (hidden, weight)), wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_rows_without_a_target_have_no_gradient():
    hidden, weight, targets = problem()
    linear_cross_entropy(hidden, weight, targets, 1.0).backward()
    assert (hidden.grad[targets < 0] == 0).all() and (hidden.grad[targets >= 0].abs().sum(-1) > 0).all()


def test_gradcheck_also_with_frozen_weights():
    hidden, weight, targets = problem(9, 4, 6)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, 5.0), (hidden, weight))
    frozen = weight.detach()
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, frozen, targets, 5.0), (hidden,))


def test_the_loss_of_bf16_inputs_is_exact_in_float32():
    hidden, weight, targets = problem(300, 64, 5000, torch.bfloat16)
    ours = linear_cross_entropy(hidden, weight, targets, (targets >= 0).sum())
    assert ours.dtype == torch.float32
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)
    # with logits rounded to bf16 the error would exceed the bound
    rounded = F.cross_entropy((hidden @ weight.t()).double(), targets)
    assert abs(rounded.item() - exact.item()) > 20e-6 * exact.item()
    for mine, theirs in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert (mine.double() - theirs.double()).abs().max() <= 1e-2 * theirs.double().abs().max()


def test_zero_targets_give_a_zero_loss_and_no_gradient():
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), 0)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_a_gradient_costs_two_passes_and_evaluation_one():
    hidden, weight, targets = problem(64, 8, 300, torch.float32)
    with torch.no_grad(), LargestTensor() as created:
        linear_cross_entropy(hidden, weight, targets, 1.0)
    assert created.products == 1
    with LargestTensor() as created:
        linear_cross_entropy(hidden, weight, targets, 1.0).backward()
    assert created.products == 4


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates, and counts matrix products."""

    largest = 0
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
            self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return out


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations have created and that still exist; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            if storage.data_ptr() not in known and storage.data_ptr() not in self.held:
                self.held[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage.data_ptr(), None)
                self.peak = max(self.peak, sum(self.held.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_holds_little_beside_its_gradients(dtype, monkeypatch):
    """300 MB at 16,384 rows of width 1,024; here rows, width and blocks of logits are scaled down by 64 together."""
    rows, width, vocab_size = 2048, 128, 2048
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", loss_module.BLOCK_BYTES // 64)
    hidden, weight, targets = problem(rows, width, vocab_size, dtype)
    with Live() as live:
        loss = linear_cross_entropy(hidden, weight, targets, 5.0)
        gradients = torch.autograd.grad(loss, (hidden, weight))
    beyond = live.peak - sum(g.untyped_storage().nbytes() for g in gradients)
    assert 1e6 < beyond <= 300e6 / 64
    with Live() as live:
        loss = F.cross_entropy((hidden @ weight.t()).float(), targets)
        torch.autograd.grad(loss, (hidden, weight))
    assert live.peak > 4 * beyond  # the plain loss


def test_logits_of_the_whole_vocabulary_never_exist(monkeypatch):
    hidden, weight, targets = problem(640, 8, 1000, torch.float32)
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 640 * 32 * 4)
    with LargestTensor() as created:
        linear_cross_entropy(hidden, weight, targets, 640.0).backward()
    assert created.largest == 640 * 32
    with LargestTensor() as created:
        F.cross_entropy(hidden @ weight.t(), targets)
    assert created.largest == 640 * 1000


def test_half_precision_and_autocast_run():
    """Nothing in this project trains in either, but a user of the model may."""
    config = ModelConfig(
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_ffn=64,
        vocab_size=64,
        d_indexer=8,
        n_indexer_heads=2,
        k_base=6,
        k_min=2,
        k_max=12,
    )
    model, tokens = GSAForCausalLM(config), torch.arange(24)[None] % 64
    exact = model(tokens, tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens).loss
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    assert model.half()(tokens).logits.isfinite().all()
