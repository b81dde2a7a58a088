"""Streams: what is given, in which order, and what is left out and counted."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import LONGEST, WIDTH, tiny_model, token_ids

from saefeat.activations import ActivationStream, load_tokens, read_activations
from saefeat.activations.shuffle import ShuffleBuffer
from saefeat.activations.sources import OutlierRule

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("bridge of Llama")


def numbered(n: int) -> torch.Tensor:
    """Rows that tell their number: [n, 2], row i being (i + 1, 1)."""
    return torch.stack([torch.arange(1.0, n + 1), torch.ones(n)], dim=1)


def numbers(batches: Any, hook: str = "a") -> list[int]:
    return [int(x) - 1 for batch in batches for x in batch[hook][:, 0]]


def sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows[np.lexsort(rows.float().numpy().T)]


def assert_same_batches(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[hook], b[hook]) for hook in a)


# The buffer.


def test_the_buffer_gives_each_row_once_and_keeps_hooks_aligned() -> None:
    generator = np.random.default_rng(0)
    buffer = ShuffleBuffer(100)
    added, taken = 0, []
    for n_added, n_taken in [(60, 7), (40, 90), (0, 3), (97, 50), (3, 49), (1, 1)]:
        rows = torch.arange(added, added + n_added).float()[:, None]
        buffer.add({"a": rows, "b": rows.double() * 2})
        added += n_added
        batch = buffer.take(n_taken, generator)
        assert batch["a"].shape == (n_taken, 1)
        assert batch["b"].dtype == torch.float64
        assert torch.equal(batch["a"].double() * 2, batch["b"])
        taken += batch["a"].flatten().tolist()
    taken += buffer.take(buffer.size, generator)["a"].flatten().tolist()
    assert buffer.size == 0
    assert sorted(taken) == list(range(added))


def test_the_buffer_takes_uniformly() -> None:
    counts: Counter[int] = Counter()
    generator = np.random.default_rng(0)
    for _ in range(4000):
        buffer = ShuffleBuffer(10)
        buffer.add({"a": torch.arange(10.0)[:, None]})
        buffer.take(3, generator)
        counts.update(buffer.take(2, generator)["a"].flatten().int().tolist())
    # 800 of each are expected, with a standard deviation of 25.
    assert len(counts) == 10
    assert all(abs(n - 800) < 125 for n in counts.values())


def test_the_buffer_moves_rows_in_place_and_as_many_as_are_taken() -> None:
    buffer = ShuffleBuffer(1000)
    buffer.add({"a": torch.arange(1000.0)[:, None]})
    address = buffer.rows["a"].data_ptr()
    buffer.take(10, np.random.default_rng(0))
    assert buffer.rows["a"].data_ptr() == address
    moved = buffer.rows["a"][:990, 0] != torch.arange(990.0)
    assert int(moved.sum()) <= 10


def test_the_buffer_refuses_what_does_not_fit() -> None:
    buffer = ShuffleBuffer(4)
    buffer.add({"a": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="do not fit"):
        buffer.add({"a": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match="4 rows were asked for"):
        buffer.take(4, np.random.default_rng(0))


# Streams of tensors.


def test_an_epoch_gives_every_training_row_once() -> None:
    stream = ActivationStream.from_tensors({"a": numbered(1000)}, batch_size=64)
    train, held_out = numbers(stream), numbers(stream.held_out_batches())
    assert sorted(train + held_out) == list(range(1000))
    assert len(held_out) == 100
    assert held_out == sorted(held_out)
    sizes = [len(batch["a"]) for batch in stream]
    assert sizes == [64] * 14 + [4]


def test_rows_are_aligned_across_hooks() -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    stream = ActivationStream.from_tensors({"a": x, "b": x.double() * 2}, batch_size=64)
    assert stream.hooks == ["a", "b"]
    assert stream.widths == {"a": 8, "b": 8}
    for batches in (stream, stream.batches(2000), stream.held_out_batches(30)):
        for batch in batches:
            assert torch.equal(batch["b"], batch["a"].double() * 2)


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[int]:
        stream = ActivationStream.from_tensors(
            {"a": numbered(400)}, batch_size=32, seed=seed, held_out_fraction=0
        )
        return numbers(stream)

    assert order(0) == order(0)
    assert order(0) != order(1)
    displacement = np.abs(np.array(order(0)) - np.arange(400)).mean()
    assert displacement > 100, "a uniform order moves rows by 133 on average"


def test_batches_go_on_into_further_epochs_each_in_a_new_order() -> None:
    stream = ActivationStream.from_tensors({"a": numbered(100)}, batch_size=32, held_out_fraction=0)
    batches = list(stream.batches(330))
    assert [len(batch["a"]) for batch in batches] == [32] * 10 + [10]
    assert stream.epochs_started == 4
    given = numbers(batches)
    epochs = [given[start : start + 100] for start in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert_same_batches(batches, list(stream.batches(330)))
    assert list(stream.batches(0)) == []


def test_a_batch_larger_than_an_epoch_is_filled_from_several() -> None:
    stream = ActivationStream.from_tensors({"a": numbered(10)}, batch_size=32, held_out_fraction=0)
    (batch,) = stream.batches(32)
    assert Counter(numbers([batch]))[0] in (3, 4)
    assert [len(batch["a"]) for batch in stream] == [10]


def test_batches_are_ordinary_tensors_of_their_own() -> None:
    x = torch.randn(100, 4, requires_grad=True)
    stream = ActivationStream.from_tensors({"a": x.bfloat16()}, batch_size=50)
    first, kept = None, None
    for batch in stream:
        assert batch["a"].dtype == torch.bfloat16
        assert not batch["a"].requires_grad
        if first is None:
            first, kept = batch["a"], batch["a"].clone()
        batch["a"].requires_grad_().square().sum().backward()
    assert first is not None
    assert kept is not None
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, {}, "matrices"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(5, 2)}, {}, r"agree in n"),
        ({"a": torch.zeros(4)}, {}, "matrices"),
        ({"a": torch.zeros(4, 2, dtype=torch.long)}, {}, "floating-point"),
        ({"a": torch.zeros(1, 2)}, {}, "none to train on"),
        ({"a": torch.zeros(9, 2)}, {"held_out_fraction": 1.0}, "none to train on"),
        ({"a": torch.zeros(9, 2)}, {"held_out_fraction": float("nan")}, "is no share"),
        ({"a": torch.zeros(9, 2)}, {"batch_size": 0}, "batch_size=0"),
        ({"a": torch.zeros(9, 2)}, {"seed": -1}, "seed=-1"),
    ],
)
def test_bad_tensors_are_one_clear_error(
    tensors: Batch, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationStream.from_tensors(tensors, **options)


def test_a_row_that_is_not_finite_is_named() -> None:
    x = torch.ones(50, 3)
    x[17, 1] = torch.nan
    stream = ActivationStream.from_tensors({"a": torch.ones(50, 2), "b": x}, held_out_fraction=0)
    with pytest.raises(ValueError, match="Row 17 of the tensor 'b'"):
        list(stream)


def test_nothing_held_out_is_an_error_where_it_is_asked_for() -> None:
    stream = ActivationStream.from_tensors({"a": numbered(10)}, held_out_fraction=0)
    with pytest.raises(ValueError, match="Nothing was held out"):
        list(stream.held_out_batches(5))


# Streams of a language model.


def model_stream(model: Any, tokens: Any, **options: Any) -> ActivationStream:
    defaults = {"batch_size": 16, "contexts_per_forward": 4, "max_norm_ratio": None}
    return ActivationStream.from_model(model, tokens, HOOKS, **(defaults | options))


def test_a_model_stream_gives_what_read_activations_reads_shuffled(llama: Any) -> None:
    tokens = load_tokens(token_ids(40, 8), prepend_bos=True)
    stream = model_stream(llama, tokens)
    assert stream.hooks == HOOKS
    assert stream.widths == dict.fromkeys(HOOKS, WIDTH)
    assert (stream.context_size, stream.prepend_bos, stream.model_name) == (8, True, "external")
    given = torch.cat([torch.cat([batch[hook] for hook in HOOKS], 1) for batch in stream])
    # A first position counts as BOS and is left out, but is read by the others.
    mask = torch.ones(36, 8, dtype=torch.bool)
    read = read_activations(llama, tokens.train.ids, HOOKS)
    mask[:, 0] = False
    expected = torch.cat([read[hook][mask.flatten()] for hook in HOOKS], 1)
    assert given.shape == expected.shape == (36 * 7, 3 * WIDTH)
    assert not torch.equal(given, expected)
    torch.testing.assert_close(sorted_rows(given), sorted_rows(expected), rtol=1e-4, atol=1e-5)
    assert stream.left_out.positions_read == 36 * 8
    assert stream.left_out.special_positions == 36
    assert stream.left_out.outlier_rows == 0


def test_held_out_rows_are_those_of_the_held_out_contexts_in_order(llama: Any) -> None:
    tokens = load_tokens(token_ids(40, 8), held_out_fraction=0.2)
    stream = model_stream(llama, tokens)
    assert stream.held_out_tokens is not None
    assert torch.equal(stream.held_out_tokens.ids, tokens.ids[32:])
    batches = list(stream.held_out_batches(50))
    assert all(len(batch[HOOKS[0]]) <= 16 for batch in batches)
    expected = read_activations(llama, tokens.ids[32:], HOOKS)
    for hook in HOOKS:
        given = torch.cat([batch[hook] for batch in batches])
        torch.testing.assert_close(given, expected[hook][:50], rtol=1e-4, atol=1e-5)
    assert sum(len(batch[HOOKS[0]]) for batch in stream.held_out_batches(1000)) == 64


def test_two_iterations_give_bitwise_the_same_batches_and_another_seed_others(llama: Any) -> None:
    tokens = load_tokens(token_ids(40, 8))
    stream = model_stream(llama, tokens, buffer_rows=64)
    first = list(stream.batches(700))
    assert_same_batches(first, list(stream.batches(700)))
    assert stream.epochs_started == 3
    again = model_stream(llama, tokens, buffer_rows=64)
    list(again.held_out_batches())
    assert_same_batches(first, list(again.batches(700)))
    other = next(iter(model_stream(llama, tokens, buffer_rows=64, seed=1)))
    assert not torch.equal(first[0][HOOKS[0]], other[HOOKS[0]])


def test_a_batch_mixes_tokens_of_many_contexts() -> None:
    model = tiny_model("bridge of GPT-2")
    # The first embedding dimension says which context a row comes from, and nothing else.
    embedding = model.original_model.transformer.wte.weight
    position = model.original_model.transformer.wpe.weight
    with torch.no_grad():
        embedding[:, 0], position[:, 0] = torch.arange(len(embedding)), 0
    ids = torch.arange(40)[:, None].repeat(1, 16)
    hook = "blocks.0.hook_resid_pre"
    stream = ActivationStream.from_model(
        model, load_tokens(ids), hook, batch_size=32, buffer_rows=256, max_norm_ratio=None
    )
    for index, batch in enumerate(stream.batches(288)):
        contexts = batch[hook][:, 0].round().int().tolist()
        assert len(set(contexts)) >= 10, f"batch {index} holds {sorted(set(contexts))}"


def test_attention_sinks_are_left_out_at_every_hook_and_counted() -> None:
    model = tiny_model("bridge of Llama")
    sink = 7
    with torch.no_grad():
        model.original_model.model.embed_tokens.weight[sink] *= 1000
    ids = token_ids(40, 8)
    ids[ids == sink] = 8
    ids[3, 5] = ids[20, 2] = ids[39, 7] = sink
    tokens = load_tokens(ids)
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    options = {"batch_size": 16, "contexts_per_forward": 4}
    stream = ActivationStream.from_model(model, tokens, hooks, **options)
    batches = list(stream)
    assert sum(len(batch[hooks[0]]) for batch in batches) == 36 * 8 - 2
    assert all(len({len(x) for x in batch.values()}) == 1 for batch in batches)
    norms = torch.cat([batch[hooks[0]].norm(dim=1) for batch in batches])
    assert norms.max() < 10 * norms.median()
    assert stream.left_out.outlier_rows == 2
    assert stream.left_out.outliers == {hooks[0]: 2, hooks[1]: 0}
    list(stream.held_out_batches())
    assert stream.left_out.outlier_rows == 1
    assert stream.left_out.positions_read == 32
    with_sinks = ActivationStream.from_model(model, tokens, hooks, max_norm_ratio=None, **options)
    assert sum(len(batch[hooks[0]]) for batch in with_sinks) == 36 * 8


def test_the_running_median_is_a_weighted_mean_of_medians() -> None:
    rule = OutlierRule(10.0)
    assert rule.outliers(torch.tensor([[1.0, 1.0, 10.5]])).tolist() == [[False, False, True]]
    # Medians 1, then 2: the running median is (0.99 * 1 + 2) / 1.99 = 1.5025.
    outliers = rule.outliers(torch.tensor([[2.0, 1.0, 2.0, 15.02, 15.03]]))
    assert outliers.tolist() == [[False, False, False, False, True]]


@pytest.mark.parametrize("kind", ["bridge of GPT-NeoX", "HookedTransformer"])
def test_nan_weights_are_an_error_that_names_hook_and_context(kind: str) -> None:
    model = tiny_model(kind)
    ids = token_ids(12, 8)
    ids[ids == 7] = 8
    ids[5, 3] = 7
    stream = model_stream(model, load_tokens(ids))
    embedding = next(p for name, p in model.named_parameters() if "embed" in name)
    with torch.no_grad():
        embedding[7] = torch.nan
    message = r"blocks\.0\.hook_resid_post hold NaN.* in context 5\."
    with pytest.raises(ValueError, match=message):
        list(stream)


def test_left_padding_gives_no_rows_and_changes_none(llama: Any) -> None:
    ids = token_ids(20, 6)
    padded = torch.cat([torch.zeros(20, 3, dtype=torch.long), ids], dim=1)
    mask = torch.arange(9).expand(20, 9) >= 3
    plain = model_stream(llama, load_tokens(ids))
    masked = model_stream(llama, load_tokens(padded, attention_mask=mask))
    for a, b in zip(plain.held_out_batches(), masked.held_out_batches(), strict=True):
        torch.testing.assert_close(a[HOOKS[2]], b[HOOKS[2]], rtol=1e-4, atol=1e-5)
    assert sum(len(batch[HOOKS[0]]) for batch in masked) == 18 * 6
    assert masked.left_out.special_positions == 18 * 3


def test_batches_come_in_the_dtype_of_the_model() -> None:
    model = tiny_model("bridge of Llama").to(torch.bfloat16)
    stream = model_stream(model, load_tokens(token_ids(10, 8)), batch_size=64)
    batch = next(iter(stream))
    assert {x.dtype for x in batch.values()} == {torch.bfloat16}
    # 72 rows to train on, and room for one chunk of 4 contexts, 2 bytes a number.
    assert stream.buffer_bytes == (72 + 4 * 8) * len(HOOKS) * WIDTH * 2


def test_the_model_is_left_as_it_was_found_when_an_iteration_is_given_up(llama: Any) -> None:
    before = llama(token_ids())
    next(iter(model_stream(llama, load_tokens(token_ids(40, 8)))))
    assert all(not point.fwd_hooks for point in llama.hook_dict.values())
    assert torch.equal(llama(token_ids()), before)


def test_two_iterations_at_once_do_not_disturb_each_other(llama: Any) -> None:
    stream = model_stream(llama, load_tokens(token_ids(40, 8)), buffer_rows=32)
    alone = list(stream)
    together = list(zip(stream, stream, strict=True))
    assert_same_batches([a for a, _ in together], alone)
    assert_same_batches([b for _, b in together], alone)


def test_what_cannot_be_streamed_is_one_clear_error(llama: Any) -> None:
    tokens = load_tokens(token_ids(10, 8))
    with pytest.raises(TypeError, match="tokens"):
        model_stream(llama, tokens.ids)
    with pytest.raises(ValueError, match="tokenised for another model"):
        model_stream(llama, load_tokens(token_ids(10, 8) + 1000))
    with pytest.raises(ValueError, match=f"longer than the model's {LONGEST}"):
        model_stream(llama, load_tokens(token_ids(4, LONGEST + 1)))
    with pytest.raises(ValueError, match="buffer_rows=8"):
        model_stream(llama, tokens, buffer_rows=8)
    with pytest.raises(ValueError, match="max_norm_ratio=0"):
        model_stream(llama, tokens, max_norm_ratio=0.5)
    padding = load_tokens(token_ids(10, 8), attention_mask=torch.zeros(10, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="no position of the text counts"):
        model_stream(llama, padding)
    with pytest.raises(ValueError, match="flatten_heads"):
        ActivationStream.from_model(llama, tokens, "blocks.0.attn.hook_z")


def test_head_shaped_hooks_are_streamed_flat_on_request(llama: Any) -> None:
    hook = "blocks.0.attn.hook_z"
    stream = ActivationStream.from_model(
        llama, load_tokens(token_ids(10, 8)), hook, flatten_heads=True
    )
    assert stream.widths == {hook: WIDTH}
    assert next(iter(stream))[hook].shape == (72, WIDTH)


def test_the_reader_sees_each_context_once_in_an_epoch(llama: Any) -> None:
    read: Counter[int] = Counter()

    def count(value: torch.Tensor, hook: Any) -> None:
        read["contexts"] += len(value)

    stream = model_stream(llama, load_tokens(token_ids(40, 8)), buffer_rows=32)
    llama.hook_dict["blocks.0.hook_in"].add_hook(count)
    try:
        list(stream)
    finally:
        llama.reset_hooks()
    assert read["contexts"] == 36
