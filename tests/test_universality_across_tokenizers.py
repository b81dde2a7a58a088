"""Models with different tokenizers are compared where tokens of both end: exact answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import byte_pairs, fast, tiny_llama
from tokenizers import Tokenizer
from torch.nn.functional import normalize

import saefeat as sf
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.standard import Standard
from saefeat.superposition.universality import aligned_batches
from saefeat.superposition.universality.measure import _combinations

EMBEDDED = "blocks.0.hook_resid_pre"
HOOK = "blocks.1.hook_resid_post"
TEXTS = [
    f"{name} said “{word} 😀” to {other}, {n} times… naïve\r\n  and {word}ly so: {word}; {other}.\n"
    for n, name in enumerate(("Ann", "Bob", "Zoë"))
    for word in ("slow", "quick", "日本語", "over", "under")
    for other in ("nobody", "everybody", "all 🇩🇪 of them")
]

ASCII = [text.encode("ascii", "ignore").decode() for text in TEXTS]


def dictionary(d: int, hook_name: str, seed: int, d_sae: int = 40) -> Standard:
    made = Standard(sf.StandardConfig(), d, d_sae, Origin(hook_name=hook_name))
    directions = normalize(
        torch.randn(d_sae, d, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    with torch.no_grad():
        made.W_dec.copy_(directions)
        made.encoder.copy_(directions)
    return made


def embedding(model: Any) -> torch.Tensor:
    (found,) = (one for name, one in model.named_parameters() if ".embed_tokens." in name)
    return found


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    """Bytes; and pairs of them, of which some cross words and characters."""
    return [byte_pairs(256, TEXTS), byte_pairs(330, TEXTS, bos_token="<s>", eos_token="</s>")]


@pytest.fixture(scope="module")
def last_byte_streams(tokenizers: Any) -> list[sf.ActivationStream]:
    """Models that embed a token as its last byte: alike wherever tokens of both end together."""
    of_byte = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    letters = tokenizers[0].convert_ids_to_tokens(range(256))
    number = {letter: byte for byte, letter in enumerate(letters)}
    tokens = sf.load_aligned_tokens(TEXTS, tokenizers, 40, held_out_fraction=0.5)
    streams = []
    for tokenizer, read in zip(tokenizers, tokens, strict=True):
        model = tiny_llama(len(tokenizer))
        last = [number[one[-1]] for one in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        with torch.no_grad():
            embedding(model).copy_(of_byte[last])
        streams.append(
            sf.ActivationStream.from_model(
                model, read, EMBEDDED, batch_size=97, max_norm_ratio=None
            )
        )
    return streams


def places(tokens: sf.Tokens) -> set[tuple[int, int]]:
    assert tokens.ends is not None
    return {
        (context, end)
        for context, ends in enumerate(tokens.ends.tolist())
        for end in ends
        if end >= 0
    }


def test_rows_are_the_characters_at_which_tokens_of_both_end(last_byte_streams: Any) -> None:
    a, b = (one.held_out_tokens for one in last_byte_streams)
    common = places(a) & places(b)
    assert 200 < len(common) < min(int(a.counts.sum()), int(b.counts.sum()))
    found = []
    for (left, right), known in aligned_batches(last_byte_streams, 10_000):
        # The same bytes, by tokens that are others.
        assert torch.equal(left[EMBEDDED], right[EMBEDDED])
        for tokens, batch in ((a, left), (b, right)):
            at = known["contexts"], batch["positions"].long()
            assert torch.equal(tokens.ids[at], batch["token_ids"].long())
        ends = a.ends[known["contexts"], left["positions"].long()]
        assert torch.equal(ends, b.ends[known["contexts"], right["positions"].long()])
        found += list(zip(known["contexts"].tolist(), ends.tolist(), strict=True))
    assert found == sorted(common)
    few = [len(known["contexts"]) for _, known in aligned_batches(last_byte_streams, 50)]
    assert sum(few) == 50


def test_models_that_are_alike_are_wholly_universal_whatever_their_tokenizers(
    last_byte_streams: Any,
) -> None:
    a, b = ((dictionary(32, EMBEDDED, 0), stream) for stream in last_byte_streams)
    far = dictionary(32, EMBEDDED, 1), last_byte_streams[1]
    same = sf.universality(a, b, again=a, n_resamples=50, progress=False)
    other = sf.universality(a, far, again=a, n_resamples=50, progress=False)
    assert same.n_tokens == other.n_tokens > 200
    assert torch.equal(same.rows, same.columns)
    assert same.correlations.min() > 1 - 1e-6
    assert same.scores[0].u is not None
    assert same.scores[0].u.value == pytest.approx(1, abs=1e-6)
    assert other.scores[0].u is not None
    assert other.scores[0].u.value < 0.7
    # All that these latents say is which token it is.
    assert same.scores[-1].null_name == "token identity"
    assert same.scores[-1].matched.value == pytest.approx(0, abs=0.05)


def test_what_any_of_the_tokenizers_says_is_regressed_out() -> None:
    a, b = np.array([5, 5, 7, 7, 5]), np.array([1, 2, 1, 1, 2])
    assert _combinations(np.stack([a, a])).tolist() == a.tolist()
    assert _combinations(np.stack([a, b, a, b])).tolist() == [0, 1, 2, 2, 1]


def test_tokens_of_other_ids_give_the_very_result_that_one_tokenizer_gives() -> None:
    own = byte_pairs(330, ASCII, use_regex=True)
    written = json.loads(own.backend_tokenizer.to_str())
    vocabulary = written["model"]["vocab"]
    written["model"]["vocab"] = {token: 329 - number for token, number in vocabulary.items()}
    reversed_ids = fast(Tokenizer.from_str(json.dumps(written)))
    model, twin = tiny_llama(330), tiny_llama(330)
    with torch.no_grad():
        embedding(twin).copy_(embedding(model).flip(0))
    one = sf.load_tokens(ASCII, own, 40, held_out_fraction=0.5)
    two = sf.load_aligned_tokens(ASCII, [own, reversed_ids], 40, held_out_fraction=0.5)
    assert torch.equal(two[1].ids, 329 - one.ids)
    results = []
    for read in ((model, one), (model, one)), ((model, two[0]), (twin, two[1])):
        a, b = (
            (dictionary(32, HOOK, seed), sf.ActivationStream.from_model(*pair, HOOK))
            for seed, pair in enumerate(read)
        )
        results.append(sf.universality(a, b, again=a, n_resamples=50, progress=False))
    assert results[0].n_tokens == one.held_out.n_counted
    assert str(results[0]) == str(results[1])


def test_streams_of_other_texts_are_refused(tokenizers: Any) -> None:
    models = [tiny_llama(len(one)) for one in tokenizers]

    def streams(*tokens: sf.Tokens) -> list[sf.ActivationStream]:
        return [
            sf.ActivationStream.from_model(*pair, EMBEDDED)
            for pair in zip(models, tokens, strict=True)
        ]

    a, b = sf.load_aligned_tokens(TEXTS, tokenizers, 40, held_out_fraction=0.5)
    _, other = sf.load_aligned_tokens(TEXTS, tokenizers, 40, held_out_fraction=0.5, seed=1)
    with pytest.raises(ValueError, match="and of other texts"):
        next(aligned_batches(streams(a, other), 10))
    alone = sf.load_tokens(TEXTS, tokenizers[1], 40, held_out_fraction=0.5)
    with pytest.raises(ValueError, match="one call of load_aligned_tokens"):
        next(aligned_batches(streams(a, alone), 10))
    assert next(aligned_batches(streams(a, b), 10))


def test_a_store_keeps_where_tokens_end(last_byte_streams: Any, tmp_path: Path) -> None:
    live, other = last_byte_streams
    sf.cache_activations(other, tmp_path / "acts", held_out_tokens=300, progress=False)
    stored = sf.ActivationStream.from_store(tmp_path / "acts")
    n_rows = 0
    for (left, right), _ in aligned_batches([live, stored], 10_000):
        assert torch.equal(left[EMBEDDED], right[EMBEDDED])
        n_rows += len(left[EMBEDDED])
    assert 50 < n_rows < 300


def test_two_real_models_with_different_tokenizers_are_compared(smollm2: Any) -> None:
    tiny = sf.load_model("tiny-a")
    models = tiny, smollm2
    tokens = sf.load_aligned_tokens(
        TEXTS, [one.tokenizer for one in models], 48, held_out_fraction=0.8
    )
    readers = [
        (
            dictionary(model.cfg.d_model, HOOK, 0),
            sf.ActivationStream.from_model(model, read, HOOK),
        )
        for model, read in zip(models, tokens, strict=True)
    ]
    result = sf.universality(*readers, n_resamples=50, progress=False)
    # Bytes end at every character; of SmolLM2's tokens some end inside of one.
    assert tokens[1].ends is not None
    n_ends = int((tokens[1].held_out.ends >= 0).sum())
    assert 0.9 * n_ends < result.n_tokens <= n_ends < tokens[1].held_out.n_counted
    assert result.n_contexts == tokens[0].n_held_out
    # Latents at random in two models have little in common, and more than at other places.
    assert result.scores[0].matched.value > result.scores[0].null.value
