"""Stop strings end a completion after exactly the token that completes one, however its text is cut into tokens."""

import numpy as np
import pytest

from tx_async.engine.stops import StopStrings, load_decoder
from tx_async.errors import InvalidRequest
from tx_async.testing.models import make_qwen3


def decode(tokens):
    """A byte-level tokenizer."""
    return bytes(int(token) for token in tokens).decode(errors="replace")


def tokens_of(text):
    return list(text.encode())


def first_completion(strings, tokens, prompt=()):
    """By definition: the shortest completion whose text contains a stop string."""
    return next((n for n in range(1, len(tokens) + 1) if any(s in decode(tokens[:n]) for s in strings)), None)


def found(strings, tokens, chunks, prompt=()):
    stops, done = StopStrings(strings, decode, list(prompt)), 0
    for size in chunks:
        if (count := stops.feed(tokens[done : done + size])) is not None:
            return done + count
        done += size
    return None


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(
    ("text", "strings", "expected"),
    [
        ("hello\n\nUser: hi", ["\n\nUser:"], 12),
        ("aaab", ["aab"], 4),
        ("abcabcabd", ["abcabd"], 9),
        ("one END two END", ["END"], 7),
        ("xyz", ["z", "yz"], 3),
        ("naïve café stop", ["é s"], 14),
        ("🙂🙃 done", ["🙃"], 8),
        ("nothing here", ["never"], None),
        ("never", ["never"], 5),
        ("n", ["n"], 1),
        ("日本語です。次", ["です。"], 18),
    ],
)
def test_stop_strings(text, strings, expected, chunk):
    tokens = tokens_of(text)
    assert found(strings, tokens, [chunk] * len(tokens)) == expected == first_completion(strings, tokens)


def test_a_stop_string_in_the_prompt_or_across_its_end_does_not_stop():
    assert found(["END"], tokens_of("D and on"), [3] * 4, prompt=tokens_of("the EN")) is None
    assert found(["END"], tokens_of(" the END"), [3] * 4, prompt=tokens_of("END")) == 8


def test_a_completion_that_starts_inside_a_character():
    prompt, rest = tokens_of("caf") + tokens_of("é")[:1], tokens_of("é")[1:] + tokens_of(" stop")
    assert found([" stop"], rest, [1] * 6, prompt=prompt) == 6


def test_random_bytes_agree_with_the_definition():
    """Long texts with invalid bytes, so that the window moves on and characters stay incomplete."""
    rng = np.random.default_rng(0)
    alphabet = np.array([*b"ab ", *"é🙂".encode(), 0x80, 0xFF])
    for _ in range(300):
        tokens = rng.choice(alphabet, 80).tolist()
        strings = [decode(rng.choice(alphabet[:3], rng.integers(1, 6))), "é a", "🙂"][: rng.integers(1, 4)]
        chunks = rng.integers(1, 9, 80).tolist()
        assert found(strings, tokens, chunks) == first_completion(strings, tokens)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, "", "has no tokens"),
        ("tokenizer.json", "{", "cannot be loaded"),
        ("tokenizer.json", "", "cannot be loaded"),
        ("tokenizer_config.json", "[", "cannot be loaded"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_the_requests_own_failure(tmp_path, name, content, words):
    make_qwen3(tmp_path, tokenizer=name is not None)
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidRequest, match=words):
        load_decoder(str(tmp_path))


def test_a_token_beyond_the_tokenizers_has_no_text(tiny_qwen3):
    """The vocabulary of the model is padded to 320; the tokenizer knows 257."""
    assert load_decoder(str(tiny_qwen3))([65, 66, 300, 319]) == load_decoder(str(tiny_qwen3))([65, 66])
