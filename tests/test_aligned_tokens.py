"""Contexts of the same text for several tokenizers, against plain Python on awkward text."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import byte_pairs, fast, token_ids
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import saefeat as sf
from saefeat.activations.token_ends import tokenise_with_ends

AWKWARD = [
    "naïve café, cafe\u0301 and ﬁne ½ İstanbul",
    "  two leading spaces,   three inside and one behind ",
    "one\r\ntwo\r\n\r\n\tthree\n",
    "family 👩‍👩‍👧 of 🇩🇪🇫🇷 and 😀😀 smiling",
    "日本語のテキストと한글 and x\u200by",
    "\x1e a separator \x00 of its own\x1e",
    "plain words that are said twice, plain words that are said twice",
]
WORDS = ["the quick brown fox jumps over the lazy dog, again and again. " * n for n in range(1, 30)]


def letters(normalizer: Any, pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, as they are once normalised."""
    known = sorted(
        {letter for text in AWKWARD for letter in normalizer.normalize_str(text)} | {"▁"}
    )
    vocabulary = {letter: number for number, letter in enumerate(["<unk>", *known])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return fast(tokenizer, unk_token="<unk>")


def ends_by_bytes(text: str, ids: Sequence[int], tokenizer: Any) -> list[int]:
    """The characters that the bytes of all tokens so far make, where they make whole ones."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    read = b""
    n_before = 0
    ends = []
    for token in tokenizer.convert_ids_to_tokens(ids):
        read += bytes(byte_of[character] for character in token)
        body = read.removeprefix(b" ") if not text.startswith(" ") else read
        try:
            n_characters = len(body.decode())
        except UnicodeDecodeError:
            n_characters = -1
        ends.append(n_characters if n_characters > n_before else -1)
        n_before = max(n_before, n_characters)
    assert body.decode() == text
    return ends


def ends_by_prefix(text: str, ids: Sequence[int], tokenizer: Any) -> list[int]:
    """How much of the text gives the tokens so far, where it is one stretch, spaces aside."""
    tokens_of = [
        tokenizer(text[:n], add_special_tokens=False)["input_ids"] for n in range(len(text) + 1)
    ]
    ends = []
    for n_tokens in range(1, len(ids) + 1):
        found = [n for n, tokens in enumerate(tokens_of) if n and tokens == list(ids[:n_tokens])]
        is_known = found and not text[found[0] : found[-1]].strip()
        ends.append(found[0] if is_known else -1)
    return ends


@pytest.mark.parametrize("size", [256, 300, 420])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_regex": True},
        {"add_prefix_space": True},
        {"use_regex": True, "trim_offsets": True},
    ],
    ids=str,
)
def test_tokens_of_bytes_end_where_their_bytes_do(size: int, options: dict[str, Any]) -> None:
    tokenizer = byte_pairs(size, AWKWARD, **options)
    found = tokenise_with_ends(AWKWARD, tokenizer)
    for text, (ids, ends) in zip(AWKWARD, found, strict=True):
        assert ends.tolist() == ends_by_bytes(text, ids, tokenizer), text


def test_tokens_whose_last_spaces_are_not_told_end_nowhere() -> None:
    tokenizer = byte_pairs(420, AWKWARD, trim_offsets=True)
    n_cut = 0
    found = tokenise_with_ends(AWKWARD, tokenizer)
    for text, (ids, ends) in zip(AWKWARD, found, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        for token, end, expected in zip(
            tokens, ends, ends_by_bytes(text, ids, tokenizer), strict=True
        ):
            is_cut = token.endswith("Ġ") and token.strip("Ġ") != ""
            assert end == (-1 if is_cut else expected), (text, token)
            n_cut += is_cut
    assert n_cut > 5


NORMALISED = {
    "NFC": (normalizers.NFC(), None),
    "NFKC": (normalizers.NFKC(), None),
    "NFD": (normalizers.NFD(), None),
    "lower case": (normalizers.Lowercase(), None),
    "no accents": (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), None),
    "BERT": (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "Llama": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),
    "SentencePiece": (normalizers.Sequence([]), pre_tokenizers.Metaspace(prepend_scheme="always")),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_tokens_of_normalised_text_end_where_the_text_so_far_gives_them(name: str) -> None:
    tokenizer = letters(*NORMALISED[name])
    found = tokenise_with_ends(AWKWARD, tokenizer)
    for text, (ids, ends) in zip(AWKWARD, found, strict=True):
        expected = ends_by_prefix(text, ids, tokenizer)
        for end, known, token in zip(
            ends, expected, tokenizer.convert_ids_to_tokens(ids), strict=True
        ):
            # Tokenizers do not say that the accent is of the letter with which it was composed.
            assert end == known or (name in ("NFC", "NFKC") and (end, token) == (-1, "é")), text
        assert (ends >= 0).sum() > 0.5 * len(text)


def test_text_that_is_stripped_or_of_no_token_ends_none() -> None:
    ((_, ends),) = tokenise_with_ends(["  Ab  "], letters(normalizers.Strip()))
    assert ends.tolist() == [3, 4]
    ((_, ends),) = tokenise_with_ends(["a\u200bb"], letters(normalizers.Replace("\u200b", "")))
    assert ends.tolist() == [-1, 3], "whether the first token is of the mark too is not known"


# Contexts.


def body(tokens: sf.Tokens, context: int, tokenizer: Any, upto: int | None = None) -> str:
    """The text of a context's tokens up to a position, without separators."""
    counted = tokens.counts[context].clone()
    if upto is not None:
        counted[upto + 1 :] = False
    return str(tokenizer.decode(tokens.ids[context][counted], clean_up_tokenization_spaces=False))


def cut_by_hand(text: str, tokenizers: Sequence[Any], size: int) -> list[str]:
    """Of one document: as much text at a time as fits, by trying every end from the last."""
    ends = []
    for tokenizer in tokenizers:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = enumerate(ends_by_bytes(text, ids, tokenizer), start=1)
        ends.append({0: 0} | {end: n_tokens for n_tokens, end in found if end > 0})
    places = [end for end in ends[0] if all(end in one for one in ends)]
    contexts = []
    start = 0
    while start < len(text):
        fitting = [
            end
            for end in places
            if end > start and all(one[end] - one[start] <= size for one in ends)
        ]
        stop = max(fitting)
        is_full = any(one[stop] - one[start] == size for one in ends)
        if stop < len(text) or is_full:
            contexts.append(text[start:stop])
        start = stop
    return contexts


@pytest.mark.parametrize("sizes", [(256, 420), (300, 420), (420, 256, 330)], ids=str)
def test_contexts_are_as_long_as_fits_and_ends_are_of_their_characters(sizes: Any) -> None:
    tokenizers = [byte_pairs(size, AWKWARD, use_regex=size == 330) for size in sizes]
    text = "".join(AWKWARD) * 3
    loaded = sf.load_aligned_tokens([text], tokenizers, 64, held_out_fraction=0)
    expected = cut_by_hand(text, tokenizers, 64)
    assert len(expected) > 8
    for tokens, tokenizer in zip(loaded, tokenizers, strict=True):
        assert [body(tokens, i, tokenizer) for i in range(tokens.n_contexts)] == expected
        assert tokens.ends is not None
        for context, written in enumerate(expected):
            ids = tokens.ids[context][tokens.counts[context]].tolist()
            ends = tokens.ends[context][tokens.counts[context]].tolist()
            assert ends == ends_by_bytes(written, ids, tokenizer)
        assert (tokens.ends[~tokens.counts] == -1).all()
        assert tokens.context_size <= 64
        assert torch.equal(tokens.text_hashes, loaded[0].text_hashes)
    assert loaded[0].ids.shape != loaded[1].ids.shape or not torch.equal(
        loaded[0].ids, loaded[1].ids
    )
    assert len(set(expected)) == len(loaded[0].text_hashes.unique())


def test_documents_bos_separators_and_held_out_are_as_for_one_tokenizer() -> None:
    documents = [f"{number:03} {text}" for number, text in enumerate(WORDS)]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    pair = byte_pairs(270, AWKWARD, **special), byte_pairs(400, WORDS, use_regex=True)
    a, b = sf.load_aligned_tokens(documents, pair, 48, held_out_fraction=0.2)
    assert (a.prepend_bos, b.prepend_bos) == (True, False)
    assert (a.ids[:, 0] == pair[0].bos_token_id).all()
    assert a.context_size == 48
    assert a.n_contexts == b.n_contexts
    assert a.n_held_out == b.n_held_out
    assert 0.1 < a.n_held_out / a.n_contexts < 0.3
    for context in range(a.n_contexts):
        assert body(a, context, pair[0]) == body(b, context, pair[1])
    # BOS, separators and padding do not count, and padding is masked.
    assert a.attention_mask is not None
    is_special = (a.ids == pair[0].bos_token_id) | (a.ids == pair[0].eos_token_id)
    assert torch.equal(a.counts, a.attention_mask & ~is_special)
    assert int((a.ids[a.attention_mask] == pair[0].eos_token_id).sum()) > 20
    numbers = [
        {
            int(found)
            for i in range(part.n_contexts)
            for found in re.findall(r"\d{3}", body(part, i, pair[1]))
        }
        for part in (b.train, b.held_out)
    ]
    assert len(numbers[0]) > 15
    assert len(numbers[1]) > 1
    assert numbers[0].isdisjoint(numbers[1])
    assert b.held_out.ends is not None
    assert len(b.held_out.ends) == len(b.held_out.text_hashes) == b.n_held_out


@pytest.mark.parametrize("max_tokens", [None, 600])
def test_with_one_tokenizer_contexts_are_those_of_load_tokens(max_tokens: int | None) -> None:
    tokenizer = byte_pairs(400, WORDS, eos_token="</s>")
    options: dict[str, Any] = {"max_tokens": max_tokens, "held_out_fraction": 0.25, "seed": 3}
    alone = sf.load_tokens(WORDS, tokenizer, 32, **options)
    for tokens in sf.load_aligned_tokens(WORDS, [tokenizer, tokenizer], 32, **options):
        assert torch.equal(tokens.ids, alone.ids)
        assert torch.equal(tokens.counts, alone.counts)
        assert tokens.n_held_out == alone.n_held_out
        assert tokens.prepend_bos == alone.prepend_bos
        assert tokens.attention_mask is None
        assert tokens.ends is not None
        assert torch.equal(tokens.ends >= 0, tokens.counts)


def test_text_without_a_common_end_for_a_context_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    long_word = "0" * 40
    bytewise, words = (
        byte_pairs(256, AWKWARD),
        Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
    )
    words.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    text = "one two three " * 5 + long_word + " four five six" * 5
    a, b = sf.load_aligned_tokens([text], [bytewise, fast(words)], 16, held_out_fraction=0)
    read = [body(a, context, bytewise) for context in range(a.n_contexts)]
    assert "0" not in "".join(read)
    assert any("four" in one for one in read)
    assert a.n_contexts == b.n_contexts
    assert "Left out: 41 characters" in caplog.text


def chunks_of(n: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f".{{{n}}}"), "isolated")
    return fast(tokenizer)


def test_bad_input_is_one_clear_error() -> None:
    text, bytewise = "a" * 1200, byte_pairs(256, AWKWARD)
    with pytest.raises(ValueError, match=r"at 100 characters, of the 300.*least_aligned=0.5"):
        sf.load_aligned_tokens([text], [chunks_of(3), chunks_of(4)], 16)
    few, _ = sf.load_aligned_tokens([text], [chunks_of(3), chunks_of(4)], 16, least_aligned=0.3)
    assert few.n_contexts > 10
    for source, tokenizers, options, message in (
        ([text], [], {}, "a tokenizer for each model, got 0"),
        ([text], [bytewise], {"least_aligned": 1.5}, "least_aligned from 0 to 1, got 1.5"),
        ([text], [bytewise, None], {}, "NoneType does not say at which character"),
        ([], [bytewise], {}, "no text.*empty"),
        (["abc"], [bytewise, bytewise], {}, "holds 3, 3 tokens, less than one context of 16"),
        ([text], [bytewise], {"prepend_bos": True}, "neither"),
        ([text], [bytewise], {"held_out_fraction": 1.0}, "held_out_fraction=1.0"),
        ([text], [bytewise], {"max_tokens": 8}, "max_tokens=8"),
        ([{"input_ids": [1, 2]}], [bytewise], {}, "Document 0 is token ids"),
    ):
        with pytest.raises(ValueError, match=message):
            sf.load_aligned_tokens(source, tokenizers, 16, **options)
    with pytest.raises(TypeError, match="A tensor of token ids has no text"):
        sf.load_aligned_tokens(token_ids(3, 8), [bytewise], 16)
