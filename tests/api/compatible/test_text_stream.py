"""Tokens become text piece by piece: whole characters, nothing of a stop string, right offsets."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models

from tx_async.api.compatible.text_stream import TextStream, name_of
from tx_async.api.compatible.tokenizer import Tokenizer, load
from tx_async.testing.models import make_byte_tokenizer

MARKS = ("<|endoftext|>", "<|im_end|>", "<｜fullwidth｜>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_byte_tokenizer(folder)
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens(list(MARKS[1:]))
    fast.add_tokens(["<think>"])
    fast.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load(str(folder))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> tuple[Tokenizer, Fast]:
    """Byte tokens, and words that begin with a space."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    vocabulary = {"<unk>": 0, "▁": 1, "▁Hello": 2, "▁you": 3, "é": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    fast = Fast(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.save(str(folder / "tokenizer.json"))
    return load(str(folder)), fast


def streamed(tokenizer: Tokenizer, tokens, cuts=(), stop_reason="length", **options) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, **options)
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    pieces = [stream.feed(tokens[a:b])[0] for a, b in itertools.pairwise(bounds)]
    pieces.append(stream.feed([], stop_reason)[0])
    return pieces, stream


@given(st.lists(st.integers(0, 259), max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_pieces_together_are_what_the_tokenizer_decodes(tokenizer, folder, tokens, cuts):
    theirs = Fast.from_file(str(folder / "tokenizer.json")).decode(tokens, skip_special_tokens=False)
    pieces, _ = streamed(tokenizer, tokens, cuts, shown=MARKS)
    assert "".join(pieces) == theirs


@given(st.text(max_size=20), st.lists(st.integers(0, 80), max_size=6))
def test_no_piece_ends_within_a_character(tokenizer, text, cuts):
    pieces, _ = streamed(tokenizer, tokenizer.encode(text, framed=False), cuts)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(st.lists(st.sampled_from("ab€😀\n"), max_size=12).map("".join), st.lists(st.integers(0, 40), max_size=6))
@pytest.mark.parametrize("stops", [["ab"], ["😀", "a€"], ["\n", "bb\n"], ["abab", "ba"]])
def test_nothing_of_a_stop_string_is_given_out(tokenizer, stops, text, cuts):
    tokens = tokenizer.encode(text, framed=False)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    pieces, stream = streamed(tokenizer, tokens, cuts, stops=stops)
    assert "".join(pieces).startswith(text[: min(places, default=len(text))])
    assert (stream.stop is not None) == bool(places)
    assert not any(stop in "".join(pieces) for stop in stops)


@given(st.text(alphabet="aß€😀", max_size=12))
def test_a_token_begins_where_the_characters_before_it_end(tokenizer, text):
    tokens = tokenizer.encode(text, framed=False)
    _, offsets = TextStream(tokenizer).feed(tokens, "length")
    data = text.encode()
    # byte-level: a token a byte; within a character it begins where the character does
    assert offsets == [len(data[:i].decode(errors="ignore")) for i in range(len(data))]


def test_special_tokens_are_shown_to_who_wants_to_see_them_only(tokenizer):
    end = tokenizer.encode("<|im_end|>", framed=False)
    tokens = [*tokenizer.encode("a", framed=False), *end, *tokenizer.encode("<think>b", framed=False)]
    assert "".join(streamed(tokenizer, tokens)[0]) == "a<think>b"
    assert "".join(streamed(tokenizer, tokens, shown=["<|im_end|>"])[0]) == "a<|im_end|><think>b"


def test_a_token_that_ends_the_sample_is_cut_whatever_it_is(tokenizer):
    tokens = tokenizer.encode("abc", framed=False)
    stream = TextStream(tokenizer, ends=[tokens[-1]])
    assert stream.feed(tokens, "stop")[0] == "ab"
    assert TextStream(tokenizer, ends=[tokens[-1]]).feed(tokens, "length")[0] == "abc"


def test_a_stop_string_may_reach_into_a_special_token(tokenizer):
    tokens = tokenizer.encode("a\n<|im_end|>", framed=False)
    stream = TextStream(tokenizer, stops=["\n<|im"])
    assert "".join([stream.feed([token])[0] for token in tokens]) == "a"
    assert stream.stop == "\n<|im"


def test_bytes_of_a_sentencepiece_vocabulary(sentencepiece):
    tokenizer, fast = sentencepiece
    tokens = [2, 3, 4, *(5 + byte for byte in "€".encode()), 1]
    pieces, _ = streamed(tokenizer, tokens, range(len(tokens)))
    assert "".join(pieces) == fast.decode(tokens) == " Hello youé€ "


def test_a_number_beyond_the_vocabulary_has_no_text(tokenizer):
    assert "".join(streamed(tokenizer, [5000])[0]) == ""


def test_a_part_of_a_character_is_named_by_its_bytes(tokenizer):
    names = [name_of(tokenizer, token) for token in tokenizer.encode("a€", framed=False)]
    assert names == ["a", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac"]


def test_a_text_is_framed_as_the_settings_say(folder):
    path = folder / "tokenizer_config.json"
    before = path.read_text()
    settings = json.loads(before)
    path.write_text(json.dumps(settings | {"add_bos_token": True, "bos_token": "<|im_end|>"}))
    try:
        tokenizer = load(str(folder))
        assert tokenizer.encode("a", framed=True) == [*tokenizer.encode("<|im_end|>a", framed=False)]
        assert tokenizer.encode("a", framed=False) == load(str(folder)).encode("a", framed=False)
    finally:
        path.write_text(before)
