"""Compares a backend with the float64 reference, operation by operation, and checks models on it by docs/gsa.md, 9.

k is far below the length throughout, because many faults do not show when every key is selected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from random import Random
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gsa import GSAForCausalLM, ModelConfig, kernels
from gsa.attention.cache import Cache, LayerCache
from gsa.attention.gates import Gate
from gsa.attention.indexer import Indexer
from gsa.kernels import reference
from gsa.kernels.reference import LEVELS

GROUPS = (1, 2, 4, 8)
"""Numbers of query heads that share a key/value head."""
MODES = ("off", "variance", "entropy")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For the modules that import it: with tensors this small a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trials(examples: int) -> settings:
    """This many examples without a deadline; not shrunk, because in Triton's interpreter one takes a second."""
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    return settings(deadline=None, max_examples=examples, phases=phases, suppress_health_check=[HealthCheck.too_slow])


# -- operations -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The sizes of one comparison. documents: how many are packed into each row, at random places.

    tied: every key is one of five, whose scores are far apart in a row. Rounding then never changes the order of two
    keys, so that sets are equal in any precision, though the last selected key ties with others.
    """

    B: int = 2
    T: int = 37
    S: int = 37
    H: int = 4
    G: int = 2
    D: int = 16
    J: int = 2
    E: int = 16
    k: int = 7
    documents: int = 1
    mode: str = "off"
    tied: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    @property
    def rule(self) -> kernels.SelectionRule:
        return kernels.SelectionRule(self.mode, 1.0, self.k, max(1, self.k // 2), 2 * self.k)


@st.composite
def cases(draw, dtypes: tuple[torch.dtype, ...] = (torch.float64,), device: str = "cpu") -> Case:
    T = draw(st.integers(1, 48))
    few = st.integers(1, max(1, T // 5))
    return Case(
        B=draw(st.integers(1, 2)),
        T=T,
        S=T + draw(st.sampled_from([0, 0, 1, 9])),
        H=8,
        G=draw(st.sampled_from(GROUPS)),
        J=draw(st.integers(1, 4)),
        k=draw(st.one_of(few, few, few, st.integers(1, 60))),
        documents=draw(st.integers(1, 4)),
        mode=draw(st.sampled_from(MODES)),
        tied=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
        dtype=draw(st.sampled_from(dtypes)),
        device=device,
    )


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    index: kernels.Index
    alpha: torch.Tensor
    doc_start: torch.Tensor | None
    rows: torch.Tensor
    d_out: torch.Tensor

    def to(self, dtype: torch.dtype, device: str) -> Inputs:
        """Leaves of `dtype` on `device`. alpha stays float32 as in the layer, unless everything is float64."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        leaf = lambda x, dtype: x.to(device, dtype).detach().requires_grad_()  # noqa: E731
        index = kernels.Index(*(leaf(x, dtype) for x in self.index))
        start = None if self.doc_start is None else self.doc_start.to(device)
        q, k, v = (leaf(x, dtype) for x in (self.q, self.k, self.v))
        return Inputs(
            q, k, v, index, leaf(self.alpha, exact), start, self.rows.to(device), self.d_out.to(device, dtype)
        )


def inputs(case: Case) -> Inputs:
    """Random tensors, rounded to the dtype of the case first, so that the reference gets the same numbers."""
    random = torch.Generator().manual_seed(case.seed)
    B, T, S, H, G, D, J, E = case.B, case.T, case.S, case.H, case.G, case.D, case.J, case.E

    def draw(*shape):
        return torch.randn(*shape, generator=random).to(case.dtype).double()

    start = None
    if case.documents > 1:
        ends = torch.randint(0, S, (B, case.documents - 1, 1), generator=random)
        place = torch.arange(S - T, S)
        start = torch.where(ends <= place, ends, 0).amax(1)
    index = kernels.Index(draw(B, T, J, E), draw(B, S, E), draw(B, T, J), draw(J) * 0.1)
    if case.tied:
        kind = torch.randint(0, 5, (B, S), generator=random)
        index.k.copy_(torch.nn.functional.one_hot(kind, E))
        logits = torch.rand(B, T, 1, 5, generator=random).argsort(-1).double() - 2  # -2 ... 2, the same for every head
        index.q[..., :5] = logits * E**0.5
    rows = torch.randperm(T, generator=random)[: max(1, T // 4)].sort().values
    return Inputs(
        draw(B, T, H, D),
        draw(B, S, G, D),
        draw(B, S, G, D),
        index,
        torch.tensor(4.0).double(),
        start,
        rows,
        draw(B, T, H, D),
    )


V_REF = 0.01


def choose(backend: str, x: Inputs, case: Case) -> kernels.Selection:
    v_ref = torch.tensor(V_REF, device=x.q.device)
    return kernels.select(backend, x.index, x.alpha, v_ref, x.doc_start, case.rule)


def mask_of(bits: torch.Tensor | None, x: Inputs, n_keys: int) -> torch.Tensor:
    if bits is not None:
        return kernels.unpack(bits, n_keys)
    start = torch.zeros(x.q.shape[:2], dtype=torch.long) if x.doc_start is None else x.doc_start
    return kernels.visible_keys(start, n_keys)


def outputs_and_gradients(backend: str, x: Inputs, bits: torch.Tensor | None) -> dict[str, torch.Tensor]:
    out, lse = kernels.attend(backend, x.q, x.k, x.v, bits, x.doc_start)
    loss = kernels.alignment_kl(backend, x.q, x.k, lse, x.index, x.alpha, bits, x.doc_start, x.rows)
    found = {"out": out, "loss": loss}
    names = ("q", "k", "v", "index q", "index k", "weight", "bias", "alpha")
    leaves = (x.q, x.k, x.v, *x.index, x.alpha)
    gradients = torch.autograd.grad([out, loss], leaves, [x.d_out, torch.ones_like(loss)])
    return {n: t.detach().cpu().double() for n, t in (found | dict(zip(names, gradients, strict=True))).items()}


def check_selection(backend: str, case: Case) -> kernels.Selection:
    """Sets, sizes and statistics equal those of the reference.

    In float64, and for tied cases, sets are equal exactly. Otherwise keys may be exchanged whose scores differ by less
    than a level plus rounding, and k may differ where that moves it across a rounding boundary.
    """
    given = inputs(case)
    ours, exact = given.to(case.dtype, case.device), given.to(torch.float64, "cpu")
    choice, wanted = choose(backend, ours, case), choose("reference", exact, case)
    mask = mask_of(choice.bits, ours, case.S).cpu()
    k = choice.k.cpu()
    visible = mask_of(None, exact, case.S)
    assert torch.equal(mask.sum(-1), k), "a row's set does not have the size it claims"
    assert not (mask & ~visible).any(), "a hidden key is in a set"
    scores = kernels.index_scores(*exact.index)
    step = 0.0 if case.dtype == torch.float64 else case.J / LEVELS + 2e-6 * case.J
    if case.mode == "off":
        assert choice.statistic is None and torch.equal(k, wanted.k), "k is wrong"
    else:
        low, high = statistic_bounds(case.mode, wanted.statistic, scores, visible, exact.alpha, step)
        statistic = choice.statistic.cpu().double()
        assert ((statistic >= low) & (statistic <= high)).all(), "the statistic is wrong"
        ends = [reference.keys_per_query(visible.sum(-1), s, torch.tensor(V_REF), case.rule) for s in (low, high)]
        fewest, most = torch.minimum(*ends), torch.maximum(*ends)
        assert ((k >= fewest) & (k <= most)).all(), "k is wrong"
    if case.dtype == torch.float64 or case.tied:
        assert torch.equal(mask, kernels.top_keys(scores, visible, k, case.J)), "a set is not that of the reference"
    worst_in = scores.masked_fill(~mask, torch.inf).amin(-1)
    best_out = scores.masked_fill(mask | ~visible, -torch.inf).amax(-1)
    assert (worst_in >= best_out - max(step, case.J / LEVELS)).all(), "a key is out that scores higher than one in"
    return choice


def statistic_bounds(mode: str, exact: torch.Tensor, scores, visible, alpha, step: float) -> tuple[torch.Tensor, ...]:
    """Lower and upper bound of a row's statistic when scores are off by at most `step`, each (B, T)."""
    rounding = 1e-5 if step else 1e-9
    if mode == "variance":
        # a standard deviation is a norm: it moves by the deviation of the errors, at most half their range
        root, most = exact.sqrt(), step / 2 + 1e-9
        return (root * (1 - rounding) - most).clamp_min(0).square(), (root * (1 + rounding) + most).square()
    log_p = (alpha * scores).masked_fill(~visible, -torch.inf).log_softmax(-1)
    slope = torch.where(visible, log_p.exp() * (log_p + exact[..., None]).abs(), 0.0).sum(
        -1
    )  # of the entropy, by logits
    most = (slope * alpha * step + rounding * (1 + exact)).detach()
    return exact - most, exact + most


def check_attention(backend: str, case: Case, bound: float) -> None:
    """Outputs, loss and all gradients are within `bound` of the reference, relative to the largest, and repeatable."""
    given = inputs(case)
    ours, exact = given.to(case.dtype, case.device), given.to(torch.float64, "cpu")
    bits = choose("reference", exact, case).bits if case.k < case.S else None
    wanted = outputs_and_gradients("reference", exact, bits)
    there = None if bits is None else bits.to(case.device)
    found, again = (outputs_and_gradients(backend, ours, there) for _ in range(2))
    for name, tensor in found.items():
        # a true gradient can be 0, as for a query that sees one key: rounding is then relative to the size of inputs;
        # the gradients of bias and alpha are sums over all pairs of terms of a tenth, which can cancel
        least = 0.5 if name in ("out", "q", "k", "v") else 1e-2 if name in ("bias", "alpha") else 1e-3
        scale = max(wanted[name].abs().max().item(), least)
        difference = (tensor - wanted[name]).abs().max().item() / scale
        assert difference <= bound, f"{name}: {difference:.2e} > {bound:.0e}"
        assert torch.equal(tensor, again[name]), f"{name} is not repeatable"


def oldest_first(scores: torch.Tensor, visible: torch.Tensor, k: torch.Tensor, n_heads: int) -> torch.Tensor:
    """`kernels.top_keys` with ties to the oldest key, which is wrong."""
    return kernels.top_keys(scores.flip(-1), visible.flip(-1), k, n_heads).flip(-1)


# -- identities of a model ------------------------------------------------------------------------------

TINY = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    d_head=16,
    d_ffn=48,
    vocab_size=61,
    max_position_embeddings=64,
    init_std=0.2,
    d_indexer=16,
    n_indexer_heads=2,
    k_base=6,
    k_min=2,
    k_max=10,
    tie_embeddings=False,
)


@dataclass(frozen=True)
class Way:
    """A backend on which tests run models.

    module: where its operations are, to replace them by wrong ones. bound: the largest allowed difference, relative to
    the largest value, of results that are equal except for the order of sums. examples: how many random sizes an
    identity is tested at.
    """

    backend: kernels.Backend
    module: ModuleType
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    bound: float = 1e-9
    n_layers: int = 2
    examples: int = 4


@dataclass(frozen=True)
class Size:
    """One model and its text. group: query heads per key/value head. cut: where a second document begins, or None.

    tied: every third token is the same and the indexer has no positions, so that their scores tie in the first layer.
    """

    mode: str = "variance"
    group: int = 2
    tied: bool = False
    length: int = 41
    cut: int | None = 20
    seed: int = 0


KINDS = (("off", 1, True), ("variance", 2, False), ("entropy", 4, True), ("variance", 8, True))
"""(mode, group, tied) at which every identity is tested: each mode and group size, with and without ties."""


def random_size(mode: str, group: int, tied: bool, key: int) -> Size:
    """9 to 41 tokens, mostly in two documents. The key seeds a generator, since hypothesis tries small keys first."""
    random = Random(f"{mode} {group} {tied} {key}")
    length = random.randint(9, 41)
    cut = random.randint(4, length - 4) if random.random() < 0.75 else None
    return Size(mode, group, tied, length, cut, random.randint(0, 99))


def at_random_sizes(check: Callable[[Way, Size], None], way: Way, *kind, examples: int | None = None) -> None:
    """Tests an identity at random sizes of one of KINDS."""

    def tried(size: Size) -> None:
        check(way, size)

    sizes = st.integers(0, 9999).map(partial(random_size, *kind))
    trials(examples or way.examples)(given(size=sizes)(tried))()


def make(way: Way, size: Size = Size(), backend: kernels.Backend | None = None, **changes) -> GSAForCausalLM:  # noqa: B008
    """A model of this size. changes: of its configuration. v_ref is set, so that the variance rule has an effect."""
    torch.manual_seed(size.seed)
    of_size = {"adaptive_k": size.mode, "n_kv_heads": TINY.n_heads // size.group, "indexer_rope": not size.tied}
    model = GSAForCausalLM(replace(TINY, n_layers=way.n_layers, **(of_size | changes)))
    model.to(way.device, way.dtype).set_backend(backend or way.backend)
    model.update_v_ref(torch.tensor([[0.002, 1.0]] * way.n_layers, device=way.device))
    return model


def tokens_of(way: Way, size: Size, rows: int = 1, offset: int = 1) -> torch.Tensor:
    """(rows, length) int64 tokens; another offset gives others."""
    random = torch.Generator().manual_seed(size.seed + offset)
    tokens = torch.randint(0, TINY.vocab_size, (rows, size.length), generator=random)
    if size.tied:
        tokens[:, ::3] = 5
    return tokens.to(way.device)


def starts_of(way: Way, size: Size, rows: int = 1) -> torch.Tensor | None:
    if size.cut is None:
        return None
    return torch.where(torch.arange(size.length) < size.cut, 0, size.cut).expand(rows, -1).contiguous().to(way.device)


def logits_of(model: GSAForCausalLM, tokens: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, doc_start=start).logits


def losses_of(way: Way, model: GSAForCausalLM, size: Size):
    return model(tokens_of(way, size), tokens_of(way, size, offset=2), starts_of(way, size))


def gradients_of(model: GSAForCausalLM, *losses: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The gradients of each loss by every parameter, zeros where a loss does not reach one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    return [dict(zip(names, gradients, strict=True)) for gradients in found]


def assert_near(way: Way, ours: torch.Tensor, wanted: torch.Tensor, what: str = "logits") -> None:
    scale = wanted.abs().max().item()
    difference = (ours - wanted).abs().max().item()
    assert difference <= way.bound * scale, f"{what}: off by {difference:.1e}, of {scale:.1e}"


def check_no_future(way: Way, size: Size) -> None:
    """1: changing tokens after t changes no bit at or before t, in training and in evaluation."""
    model, tokens, start = make(way, size), tokens_of(way, size), starts_of(way, size)
    t = size.length * 3 // 5
    later = tokens.clone()
    later[:, t + 1 :] = (later[:, t + 1 :] + 7) % TINY.vocab_size
    whole = logits_of(model, tokens, start)[:, : t + 1]
    for training in (True, False):
        assert torch.equal(logits_of(model.train(training), later, start)[:, : t + 1], whole)


def check_rows_are_alone(way: Way, size: Size) -> None:
    """2: a sequence does not depend on the others of its batch."""
    model, tokens, start = make(way, size), tokens_of(way, size, rows=2), starts_of(way, size, rows=2)
    other = tokens.clone()
    other[1] = 5
    assert_near(way, logits_of(model, other, start)[0], logits_of(model, tokens, start)[0])


def check_documents_are_alone(way: Way, size: Size) -> None:
    """2: a document does not depend on those packed with it."""
    size = replace(size, cut=size.cut or size.length // 2)
    model, tokens = make(way, size), tokens_of(way, size)
    packed = logits_of(model, tokens, starts_of(way, size))
    for document in (slice(size.cut), slice(size.cut, None)):
        assert_near(way, packed[:, document], logits_of(model, tokens[:, document]))


def check_all_keys_are_dense_attention(way: Way, size: Size, stage: str = "sparse") -> None:
    """3: with k_min >= T, or in the dense stage, the layer equals the dense layer in output and every gradient.

    The dense layer runs on the reference, because the dense path of the backend could have the same fault.
    """
    k = size.length if stage == "sparse" else 2
    ours = make(way, size, k_min=k, k_base=max(k, 6), k_max=max(k, 10))
    ours.set_stage(stage)
    dense = make(way, size, backend="reference", sparse=False)
    assert not dense.load_state_dict(ours.state_dict(), strict=False).missing_keys
    tokens, start = tokens_of(way, size), starts_of(way, size)
    assert_near(way, logits_of(ours, tokens, start), logits_of(dense, tokens, start))
    (found,), (wanted,) = (gradients_of(m, losses_of(way, m, size).loss) for m in (ours, dense))
    for name, gradient in wanted.items():
        assert_near(way, found[name], gradient, name)


def check_who_learns_from_what(way: Way, size: Size, stage: str = "sparse") -> None:
    """4: the indexer's parameters get a gradient from the alignment loss only, all others from the other loss only."""
    model = make(way, size)
    model.set_stage(stage)
    out = losses_of(way, model, size)
    language, alignment = gradients_of(model, out.loss, out.indexer_loss)
    for name in language:
        indexer = ".indexer." in name
        assert bool(language[name].any()) is not indexer, name
        assert bool(alignment[name].any()) is indexer, name


def check_open_gates(way: Way, size: Size) -> None:
    """5: with gate biases pushed to infinity the layer equals the ungated one."""
    gated = make(way, size)
    for module in gated.modules():
        if isinstance(module, Gate):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.constant_(module.bias, 100.0)
    plain = make(way, size, value_gate=False, output_gate=False)
    plain.load_state_dict(gated.state_dict(), strict=False)
    tokens, start = tokens_of(way, size), starts_of(way, size)
    assert_near(way, logits_of(gated, tokens, start), logits_of(plain, tokens, start))


def check_decoding(way: Way, size: Size, sparse: bool = True) -> None:
    """6: decoding token by token or in two parts equals the full forward pass, as do the measured variances."""
    model, tokens = make(way, size, sparse=sparse).eval(), tokens_of(way, size, rows=1)
    prompt = size.length - 1 - size.seed % 8
    with torch.no_grad():
        whole = model(tokens)
    for parts in ([prompt] + [1] * (size.length - prompt), [prompt, size.length - prompt]):
        cache = Cache(model.config, 1, size.length, way.dtype, way.device)
        with torch.no_grad():
            found = [model(part, cache=cache) for part in tokens.split(parts, 1)]
        assert_near(way, torch.cat([f.logits for f in found], 1), whole.logits)
        total, count = sum(f.selection_stats for f in found).unbind(1)
        assert torch.equal(count, whole.selection_stats[:, 1])
        torch.testing.assert_close(total, whole.selection_stats[:, 0], rtol=max(way.bound, 1e-6), atol=0)


def check_as_the_reference(way: Way, size: Size, stage: str = "sparse") -> None:
    """7: both losses and all their gradients equal those of the model on the reference, in the same precision."""
    found = []
    for backend in (way.backend, "reference"):
        model = make(way, size, backend=backend)
        model.set_stage(stage)
        out = losses_of(way, model, size)
        found.append([{"loss": out.loss + out.indexer_loss}, *gradients_of(model, out.loss, out.indexer_loss)])
    for ours, wanted in zip(*found, strict=True):
        for name, tensor in wanted.items():
            assert_near(way, ours[name], tensor, name)


def check_recomputing(way: Way, size: Size, stage: str = "sparse") -> None:
    """8: activation checkpointing changes no bit, and computes sets and the indexer's gradients once."""
    found, calls = [], Counter()
    for scope in ("none", "block"):
        model = make(way, size)
        model.set_stage(stage)
        model.set_activation_checkpointing(scope)
        with pytest.MonkeyPatch.context() as patch:
            calls.clear()
            for name in ("select", "alignment_kl"):
                patch.setattr(way.module, name, _counted(getattr(way.module, name), calls, name))
            out = losses_of(way, model, size)
            (out.loss + out.indexer_loss).backward()
        found.append([out.loss, out.indexer_loss, out.selection_stats, *(p.grad for p in model.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    selections = way.n_layers if stage == "sparse" or size.mode == "variance" else 0
    assert calls["select"] == selections, "sets were computed again"
    if way.backend != "reference":  # its loss is plain autograd, which recomputes its graph
        assert calls["alignment_kl"] == way.n_layers, "the indexer's gradients were computed again"


def _counted(operation: Callable, calls: Counter, name: str) -> Callable:
    def counted(*args):
        calls[name] += 1
        return operation(*args)

    return counted


# -- wrong layers, on which the identities fail ---------------------------------------------------------


def _mask(q, k, bits, start) -> torch.Tensor:
    """(B, T, S) bool: the keys that each query attends to."""
    start = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device) if start is None else start
    return (
        kernels.visible_keys(start, k.shape[1])
        if bits is None or not bits.shape[-1]
        else kernels.unpack(bits, k.shape[1])
    )


def attends_to_the_next_key(attend):
    """Every query also attends to the key after it."""

    def wrong(q, k, v, bits, start):
        mask = _mask(q, k, bits, start)
        mask |= torch.eye(mask.shape[-1], dtype=torch.bool, device=q.device).roll(1, 1).triu()[-mask.shape[1] :]
        return attend(q, k, v, kernels.pack(mask), start)

    return wrong


def k_follows(statistic: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
    """k follows from this statistic instead of the variance over the visible keys."""

    def wrap(select):
        def wrong(index, alpha, v_ref, start, rule):
            visible = _mask(index.q, index.k, None, start)
            scores = kernels.index_scores(*index)
            found = statistic(scores, visible)
            k = reference.keys_per_query(visible.sum(-1), found, v_ref, rule)
            return kernels.pack(kernels.top_keys(scores, visible, k, index.q.shape[2])), k, found

        return wrong

    return wrap


def ignores_documents(select):
    return lambda index, alpha, v_ref, start, rule: select(index, alpha, v_ref, None, rule)


def leaves_out_the_first(select):
    """The first visible key of a query is never selected when there is another one."""

    def wrong(index, alpha, v_ref, start, rule):
        bits, k, statistic = select(index, alpha, v_ref, start, rule)
        mask = _mask(index.q, index.k, bits, start)
        first = mask.int().argmax(-1, keepdim=True)
        mask = mask.scatter(-1, first, mask.sum(-1, keepdim=True) == 1)
        return kernels.pack(mask), mask.sum(-1), statistic

    return wrong


def selects_new_tokens_only(select):
    """Cached tokens are never selected."""

    def wrong(index, alpha, v_ref, start, rule):
        T, S = index.q.shape[1], index.k.shape[1]
        if T < S:
            start = torch.full(index.q.shape[:2], S - T, device=index.q.device)
        return select(index, alpha, v_ref, start, rule)

    return wrong


def loses_the_bias(alignment_kl):
    """The indexer's bias gets no gradient."""

    def wrong(q, k, lse, index, *rest):
        found = alignment_kl(q, k, lse, index._replace(bias=index.bias.detach()), *rest)
        return found if isinstance(found, torch.Tensor) else (*found[:4], found[4] * 0, found[5])

    return wrong


def differs_when_recomputed(attend):
    def wrong(*args):
        out, lse = attend(*args)
        in_backward = torch._C._current_graph_task_id() != -1
        return out * (1.001 if in_backward else 1.0), lse

    return wrong


def swap(operation: str, wrong: Callable):
    """Replaces an operation of the backend by wrong(operation)."""
    return lambda patch, way: patch.setattr(way.module, operation, wrong(getattr(way.module, operation)))


def attach_the_indexer(patch: pytest.MonkeyPatch, way: Way) -> None:
    """The indexer's input is not detached."""
    forward = Indexer.forward

    def undetached(self, x, cos, sin):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch.Tensor, "detach", lambda tensor: tensor)
            return forward(self, x, cos, sin)

    patch.setattr(Indexer, "forward", undetached)


def limit_the_gates(patch: pytest.MonkeyPatch, way: Way) -> None:
    """Gates never open fully."""
    forward = Gate.forward
    patch.setattr(Gate, "forward", lambda self, x: 0.999 * forward(self, x))


def lose_the_indexers_keys(patch: pytest.MonkeyPatch, way: Way) -> None:
    """The cache returns zeros for the indexer's keys."""
    patch.setattr(LayerCache, "store_index", lambda cache, at, k: cache.index_k.zero_()[:, : at + k.shape[1]])


def reuse_nothing(patch: pytest.MonkeyPatch, way: Way) -> None:
    """A recomputed block computes sets and alignment again."""
    patch.setattr(kernels, "reuse_when_recomputing", lambda compute: compute())


def _over_all_positions(scores, visible):
    return scores.var(-1, unbiased=False)


def _relative_to_the_batch(scores, visible):
    variance = reference.score_variance(scores, visible)
    return variance / variance.mean() * 0.002


WRONG = {
    "a query attends to the next key": (check_no_future, swap("attend", attends_to_the_next_key)),
    "the variance is over later keys too": (check_no_future, swap("select", k_follows(_over_all_positions))),
    "the variance is relative to the batch": (check_rows_are_alone, swap("select", k_follows(_relative_to_the_batch))),
    "sets ignore documents": (check_documents_are_alone, swap("select", ignores_documents)),
    "a key is never selected": (check_all_keys_are_dense_attention, swap("select", leaves_out_the_first)),
    "the alignment loss reaches the rest": (check_who_learns_from_what, attach_the_indexer),
    "the indexer's bias does not learn": (check_who_learns_from_what, swap("alignment_kl", loses_the_bias)),
    "gates do not open": (check_open_gates, limit_the_gates),
    "the cache loses indexer keys": (check_decoding, lose_the_indexers_keys),
    "cached tokens are not selected": (check_decoding, swap("select", selects_new_tokens_only)),
    "recomputation differs": (check_recomputing, swap("attend", differs_when_recomputed)),
    "recomputation selects again": (check_recomputing, reuse_nothing),
}
"""Fault -> the identity that must fail on it, and the patch that causes it."""


@cache
def _holds(identity: Callable[[Way, Size], None], way: Way) -> None:
    identity(way, Size())


def check_is_caught(fault: str, way: Way) -> None:
    """An identity that holds for a model fails on the model with the fault."""
    identity, cause = WRONG[fault]
    _holds(identity, way)
    with pytest.MonkeyPatch.context() as patch:
        cause(patch, way)
        with pytest.raises(AssertionError):
            identity(way, Size())
