"""What the tokenizer gives back is compared with the text, document by document; bytes and ids are exact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers

from training.data import prepare
from training.data import tokenizer as bpe
from training.data.corpus import PrepareError, Reading, Source

PLAIN = "plain words, and a\tline\n"
CHANGING = {
    "NFC": (normalizers.NFC(), "e\u0301tude", "étude"),
    "Replace": (normalizers.Replace("\t\t", " "), "a\t\tb", "a b"),
    "Replace a pattern": (normalizers.Replace(Regex(" {3,}"), "  "), "a    b", "a  b"),
    "Replace of equal length": (normalizers.Replace("``", '""'), "``a", '""a'),
    "Replace of a lone CR": (normalizers.Replace(Regex("\r(?!\n)"), "\n"), "a\rb", "a\nb"),
    "lstrip": (AddedToken("<tool>", special=False, lstrip=True), "call   <tool> now", "call<tool> now"),
    "rstrip": (AddedToken("<tool>", special=False, rstrip=True), "call <tool>   now", "call <tool>now"),
    "a token that is decoded otherwise": (AddedToken("<é>", special=False), "a<é>b", "a<\ufffd>b"),
}


@pytest.fixture(scope="module")
def exact() -> Tokenizer:
    return bpe.train([PLAIN * 30 + "étude e\u0301tude 中文 " * 20], 330)


def changed(exact: Tokenizer, part: normalizers.Normalizer | AddedToken) -> Tokenizer:
    tokenizer = Tokenizer.from_str(exact.to_str())
    if isinstance(part, AddedToken):
        tokenizer.add_tokens([part])
    else:
        tokenizer.normalizer = part
    return tokenizer


def back(tokenizer: Tokenizer, text: str) -> bytes:
    pieces = bpe.pieces(tokenizer)
    return b"".join(pieces[i] for i in bpe.encode(tokenizer, text))


def write_records(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def encode_unit(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], *, later: list[str] | None = None, **options
) -> dict:
    """Both passes over one file of records, in this process. later: what the file holds before the second pass."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    write_records(tmp_path / "a.jsonl", texts)
    (work / "tokenizer.json").write_text(tokenizer.to_str())
    np.save(work / "split_assignment_00000.npy", np.ones(len(texts), np.uint8))
    unit = prepare.Unit(0, (Source(str(tmp_path / "a.jsonl"), "a.jsonl", None),))
    job = prepare.Job(unit, str(work), json.dumps(options), Reading("text", None, 1 << 20), False, 0, **options)
    assert not prepare._scan(job)["error"]
    write_records(tmp_path / "a.jsonl", texts if later is None else later)
    return prepare._encode_unit(job)


@given(
    text=st.text(alphabet=st.sampled_from(list("ab é日 \n\t.,'s1\u3000\r\u0301\U0001f600<|endoftext|>")), max_size=200)
)
def test_ids_are_those_of_the_plain_encode(exact, text):
    """Datasets prepared before have the ids of `Tokenizer.encode`."""
    exact.encode_special_tokens = True
    assert bpe.encode(exact, text) == exact.encode(text, add_special_tokens=False).ids
    assert back(exact, text) == text.encode()


@pytest.mark.parametrize("name", CHANGING)
def test_pieces_joined_are_what_the_decoder_gives(exact, name):
    part, text, _ = CHANGING[name]
    tokenizer = changed(exact, part)
    for sample in (PLAIN, text, f"{text} {PLAIN} {bpe.EOD}{text}"):
        decoded = tokenizer.decode(bpe.encode(tokenizer, sample), skip_special_tokens=False)
        assert back(tokenizer, sample).decode(errors="replace") == decoded


@pytest.mark.parametrize("name", CHANGING)
def test_a_document_that_does_not_come_back_is_refused_by_name(tmp_path, exact, name):
    part, text, _ = CHANGING[name]
    path = tmp_path / "t.json"
    changed(exact, part).save(str(path))
    tokenizer = bpe.load(path)  # it changes no plain text
    result = encode_unit(tmp_path, tokenizer, [PLAIN, text + PLAIN])
    assert "a.jsonl, line 2: the tokenizer does not give this text back" in result["error"]
    assert "--on_changed skip" in result["error"] and "--on_changed keep" in result["error"]


@pytest.mark.parametrize("name", CHANGING)
def test_changed_documents_are_left_out_or_kept_and_counted(tmp_path, exact, name):
    part, text, kept = CHANGING[name]
    tokenizer = changed(exact, part)
    texts = [PLAIN, text, PLAIN + "2", text + "2"]
    result = encode_unit(tmp_path, tokenizer, texts, on_changed="skip")
    assert result["dropped"] == [1, 3] and result["changed"]["names"] == ["a.jsonl, line 2", "a.jsonl, line 4"]
    assert result["splits"]["train"]["bytes"] == len(texts[0] + texts[2])

    result = encode_unit(tmp_path, tokenizer, texts, on_changed="keep")
    assert result["dropped"] == [] and result["changed"]["documents"] == 2
    assert result["changed"]["bytes"] == len((texts[1] + texts[3]).encode())
    ids = np.fromfile(tmp_path / "work" / "unit_00000.train.bin", "<u2")
    decoded = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split(bpe.EOD)
    assert decoded == [PLAIN, kept, PLAIN + "2", kept + "2", ""]
    # bits per byte divides by the bytes of the text that the dataset holds
    assert result["splits"]["train"]["bytes"] == bpe.token_bytes(tokenizer)[ids].sum()


@pytest.mark.parametrize("later", [[PLAIN, "other"], [PLAIN], [], [PLAIN, "text", "more"]])
def test_a_file_that_changes_between_the_passes_is_refused(tmp_path, exact, later):
    result = encode_unit(tmp_path, exact, [PLAIN, "text"], later=later)
    assert result["error"] == "a.jsonl was changed while it was being prepared; run the command again"


def test_dropout_of_a_given_tokenizer_is_switched_off(tmp_path, exact):
    fields = json.loads(exact.to_str())
    fields["model"]["dropout"] = 0.5
    (tmp_path / "t.json").write_text(json.dumps(fields))
    assert bpe.encode(bpe.load(tmp_path / "t.json"), PLAIN * 20) == bpe.encode(exact, PLAIN * 20)


def test_an_ordinary_token_cannot_end_documents(tmp_path, exact):
    exact.save(str(tmp_path / "t.json"))
    assert prepare._given_tokenizer(tmp_path / "t.json", bpe.EOD) is not None
    for word, reason in {"a": "ordinary token", "</s>": "has no token"}.items():
        with pytest.raises(PrepareError, match=reason):
            prepare._given_tokenizer(tmp_path / "t.json", word)
