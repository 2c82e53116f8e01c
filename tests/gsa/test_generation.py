"""Continuing a prompt: which tokens may be drawn, same seed same text, streaming, long texts."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from support.kernel_contract import one_thread  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gsa import GSAForCausalLM, ModelConfig, generation
from gsa.generation import Sampling, generate, load_model, stream_text
from gsa.weights import save_weights

CONFIG = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ffn=48,
    vocab_size=61,
    max_position_embeddings=24,
    init_std=0.3,
    d_indexer=8,
    n_indexer_heads=2,
    k_base=6,
    k_min=2,
    k_max=10,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GSAForCausalLM(CONFIG).double().eval()


def continued(model, prompt=(1, 2, 3), n=12, eod_id=-1, **sampling) -> list[int]:
    return list(generate(model, list(prompt), max_new_tokens=n, eod_id=eod_id, sampling=Sampling(**sampling)))


def test_greedy_tokens_equal_those_of_full_forward_passes(model):
    text = [1, 2, 3]
    for _ in range(12):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    assert continued(model, temperature=0) == text[3:]


def test_same_seed_same_text_and_another_seed_another(model):
    assert continued(model, seed=3) == continued(model, seed=3)
    assert len({tuple(continued(model, seed=seed)) for seed in range(4)}) == 4


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    plain = {"temperature": 1.0, "top_k": 0}
    torch.testing.assert_close(Sampling(**plain).probabilities(logits), logits.exp())
    kept = Sampling(temperature=1.0, top_k=2).probabilities(logits)
    torch.testing.assert_close(kept, torch.tensor([4 / 7, 3 / 7, 0, 0]))
    kept = Sampling(**plain, top_p=0.65).probabilities(logits)
    torch.testing.assert_close(kept, torch.tensor([4 / 7, 3 / 7, 0, 0]))
    kept = Sampling(**plain, top_p=0.71).probabilities(logits)
    torch.testing.assert_close(kept, torch.tensor([4 / 9, 3 / 9, 2 / 9, 0]))
    assert Sampling(**plain, top_p=0.01).probabilities(logits).tolist() == [1, 0, 0, 0]
    sharper = Sampling(temperature=0.5, top_k=0).probabilities(logits)
    torch.testing.assert_close(sharper, torch.tensor([16, 9, 4, 1]) / 30)


def test_top_k_keeps_k_candidates_though_many_tie():
    logits = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0])
    kept = Sampling(temperature=1.0, top_k=3).probabilities(logits)
    assert (kept > 0).sum() == 3 and kept[1] > 0
    torch.testing.assert_close(kept.sum(), torch.tensor(1.0))


def test_loading_takes_the_fastest_backend_and_reports_why_not_a_faster_one(tmp_path, monkeypatch, capsys, model):
    """On a CPU there is no choice; elsewhere the choice is that of `backend: auto`."""
    save_weights(model.state_dict(), {"model": asdict(CONFIG)}, tmp_path)
    assert load_model(tmp_path).layers[0].attention.backend == "chunked" and not capsys.readouterr().err
    for answer, warned in ((("triton", None), ""), (("chunked", "its q is off"), "not on Triton's: its q is off")):
        monkeypatch.setattr(generation, "resolve", lambda wanted, shape, device, answer=answer: answer)
        assert load_model(tmp_path).layers[0].attention.backend == answer[0]
        assert warned in capsys.readouterr().err


def test_text_beyond_the_model_s_length_continues_from_its_newest_part(model):
    text = continued(model, prompt=range(20), n=30, temperature=0)
    assert len(text) == 30
    whole = [*range(20), *text]
    # the first overflow: 18 of 24 tokens are read again
    again = model(torch.tensor([whole[24 + 1 - 18 : 24 + 1]])).logits[0, -1].argmax()
    assert text[5] == int(again)


def test_generation_stops_before_the_end_of_document(model):
    text = continued(model, temperature=0)
    assert continued(model, temperature=0, eod_id=text[4]) == text[: text.index(text[4])]


def test_a_character_of_several_tokens_is_streamed_whole():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = tokenizer.encode("aé日b").ids
    assert len(ids) == 7
    assert list(stream_text(tokenizer, iter(ids))) == ["a", "é", "日", "b"]
    assert "".join(stream_text(tokenizer, iter(ids[:2]))) == "a\ufffd"  # cut short: nothing is lost in silence
