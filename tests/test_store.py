"""The store: what is written is what is read, and what goes wrong is said and loses nothing."""

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, token_ids

import saefeat as sf
from saefeat.activations import store_writer
from saefeat.activations.batches import BufferedBatches
from saefeat.activations.quantise import dequantise, quantise
from saefeat.core.folders import RemoteFolder

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("bridge of Llama")


def numbered(n: int = 1000, **options: Any) -> sf.ActivationStream:
    """Hooks a and b: row i of a begins with i, and b is minus a, in three of its columns."""
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(n)
    options = {"batch_size": 64, "held_out_fraction": 0.2} | options
    return sf.ActivationStream.from_tensors({"a": x, "b": -x[:, :3]}, **options)


def cache(stream: sf.ActivationStream, folder: Any, *args: Any, **options: Any) -> Any:
    options = {"rows_per_shard": 100, "progress": False} | options
    return sf.cache_activations(stream, folder, *args, **options)


def joined(batches: Any) -> Batch:
    found = list(batches)
    return {name: torch.cat([batch[name] for batch in found]) for name in found[0]}


def numbers(batches: Any) -> list[int]:
    return [int(x) for x in joined(batches)["a"][:, 0]]


def in_order(folder: Any) -> Batch:
    """All training rows as they were stored."""
    return joined(sf.ActivationStream.from_store(folder).epoch(shuffle=False, with_tokens=True))


def assert_same(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name])


# What is written is what is read.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit_in_the_order_of_the_stream(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    x = torch.randn(700, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3, 2] = -0.0
    stream = sf.ActivationStream.from_tensors({"a": x, "b": x[:, 1:] * 2}, batch_size=64)
    store = cache(stream, tmp_path / "acts")
    assert (store.n_rows, store.n_held_out_rows) == (630, 70)
    assert_same(in_order(tmp_path / "acts"), joined(stream))
    opened = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=32)
    assert_same(joined(opened.held_out_batches()), joined(stream.held_out_batches()))
    signs = [joined(s)["a"].float().signbit().sum() for s in (stream, opened)]
    assert signs[0] == signs[1]


def test_int8_moves_no_value_by_more_than_the_stated_share_of_its_rows_largest() -> None:
    x = torch.randn(2000, 48, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-30, 30, 2000)[:, None]
    x[7] = 0
    x[8] = 1e-40
    restored = dequantise(*quantise(x))
    error = (restored - x).abs().double() / x.abs().amax(1, keepdim=True).double().clamp(1e-36)
    assert float(error[:8].max()) <= 1 / 254 * (1 + 1e-5)
    assert float(error[9:].max()) <= 1 / 254 * (1 + 1e-5)
    assert float(error.max()) > 0.9 / 254, "the bound would be too loose"
    assert restored[8].eq(0).all()


def test_an_int8_store_reads_as_float32_within_its_bound(tmp_path: Path) -> None:
    stream = numbered()
    store = cache(stream, tmp_path / "acts", dtype="int8")
    assert store.index.dtype == "int8"
    given, read = joined(stream), in_order(tmp_path / "acts")
    for hook in ("a", "b"):
        assert read[hook].dtype == torch.float32
        bound = given[hook].abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)
        assert ((read[hook] - given[hook]).abs() <= bound).all()
    store.verify()


def test_a_store_can_be_narrower_than_its_stream_but_not_out_of_range(tmp_path: Path) -> None:
    stream = numbered()
    cache(stream, tmp_path / "acts", dtype="bfloat16")
    assert torch.equal(in_order(tmp_path / "acts")["b"], joined(stream)["b"].bfloat16())
    large = sf.ActivationStream.from_tensors({"a": torch.full((50, 2), 1e5)})
    with pytest.raises(ValueError, match="Activations of a are beyond the range of float16"):
        cache(large, tmp_path / "large", dtype="float16")
    double = sf.ActivationStream.from_tensors({"a": torch.ones(50, 2).double()})
    with pytest.raises(ValueError, match="stream gives float64"):
        cache(double, tmp_path / "double")


def test_rows_of_a_model_keep_their_tokens_and_positions(llama: Any, tmp_path: Path) -> None:
    tokens = sf.load_tokens(token_ids(20, 8), prepend_bos=True)
    stream = sf.ActivationStream.from_model(llama, tokens, HOOKS, batch_size=16)
    cache(stream, tmp_path / "acts", shuffle=False)
    read = in_order(tmp_path / "acts")
    train = tokens.train
    assert read["token_ids"].tolist() == train.ids[:, 1:].flatten().tolist()
    assert read["positions"].tolist() == [1, 2, 3, 4, 5, 6, 7] * train.n_contexts
    expected = sf.read_activations(llama, train.ids, hooks=HOOKS)
    for hook in HOOKS:
        rows = expected[hook].view(train.n_contexts, 8, -1)[:, 1:].flatten(0, 1)
        torch.testing.assert_close(read[hook], rows)
    plain = next(iter(sf.ActivationStream.from_store(tmp_path / "acts")))
    assert list(plain) == HOOKS, "tokens come on request only"


def test_shuffled_rows_keep_their_tokens(llama: Any, tmp_path: Path) -> None:
    tokens = sf.load_tokens(token_ids(20, 8))
    stream = sf.ActivationStream.from_model(llama, tokens, HOOKS[0], batch_size=16)
    cache(stream, tmp_path / "acts")
    opened = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=16)
    read = joined(opened.epoch(with_tokens=True))
    expected = sf.read_activations(llama, tokens.train.ids, hooks=HOOKS[0])[HOOKS[0]]
    distances = (read[HOOKS[0]][:, None] - expected).abs().amax(2)
    assert float(distances.amin(1).max()) < 1e-3
    places = distances.argmin(1)
    assert len(places.unique()) > 0.9 * len(expected), "few contexts begin with the same token"
    assert torch.equal(read["token_ids"].long(), tokens.train.ids.flatten()[places])
    assert torch.equal(read["positions"].long(), places % 8)


def test_the_index_says_what_the_store_is(llama: Any, tmp_path: Path) -> None:
    tokens = sf.load_tokens(token_ids(20, 8))
    stream = sf.ActivationStream.from_model(llama, tokens, HOOKS, batch_size=16, seed=3)
    cache(stream, tmp_path / "acts", 50)
    index = json.loads((tmp_path / "acts" / "index.json").read_text())
    assert index["hooks"] == HOOKS
    assert index["widths"] == dict.fromkeys(HOOKS, 32)
    assert index["dtype"] == "float32"
    assert index["model"] == stream.model_name
    assert index["context_size"] == 8
    assert index["runs"][0]["seed"] == 3
    assert index["libraries"]["torch"] == torch.__version__
    assert [len(shard["blake2b"]) for shard in index["shards"]] == [64] * 2
    names = sorted(path.name for path in (tmp_path / "acts").iterdir())
    assert names == [
        "held-out-contexts-00000.safetensors",
        "index.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


# Reading.


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_gives_every_stored_row_once_in_an_order_of_the_seed(
    shuffle: bool, tmp_path: Path
) -> None:
    stream = numbered(2000)
    cache(stream, tmp_path / "acts", shuffle=shuffle, rows_per_shard=300)

    def order(seed: int, batch_size: int = 50) -> list[int]:
        return numbers(
            sf.ActivationStream.from_store(tmp_path / "acts", batch_size=batch_size, seed=seed)
        )

    assert sorted(order(0)) == sorted(numbers(stream))
    assert order(0) == order(0)
    assert order(0) != order(1)
    ranks = np.argsort(np.argsort(numbers(stream) if shuffle else sorted(order(0))))
    place = dict(zip(numbers(stream), ranks, strict=True))
    displacement = np.abs(np.array([place[i] for i in order(0)]) - np.arange(1600)).mean()
    assert displacement > 400, "a uniform order moves rows by 533 on average"
    # Rows that come together do not depend on how large the batches are.
    assert {*order(0, 100)[:100]} == {*order(0, 50)[:100]}


def test_epochs_follow_each_other_in_new_orders_and_batches_span_them(tmp_path: Path) -> None:
    cache(numbered(500), tmp_path / "acts")
    stream = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=64)
    batches = list(stream.batches(1000))
    assert [len(batch["a"]) for batch in batches] == [64] * 15 + [40]
    assert stream.epochs_started == 3
    given = numbers(batches)
    assert sorted(given[:400]) == sorted(given[400:800])
    assert given[:400] != given[400:800]


def test_any_subset_of_hooks_has_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    cache(numbered(), tmp_path / "acts")
    both = joined(sf.ActivationStream.from_store(tmp_path / "acts"))
    for request in ("b", ["b", "a"], "*"):
        stream = sf.ActivationStream.from_store(tmp_path / "acts", request)
        assert_same(joined(stream), {hook: both[hook] for hook in stream.hooks})
    assert sf.ActivationStream.from_store(tmp_path / "acts", "b").hooks == ["b"]
    with pytest.raises(ValueError, match="matches 'c'"):
        sf.ActivationStream.from_store(tmp_path / "acts", "c")


def test_two_iterations_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    cache(numbered(), tmp_path / "acts", shuffle=False)
    stream = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=64, buffer_rows=100)
    alone = list(stream)
    for a, b, expected in zip(stream, stream.batches(800), alone, strict=False):
        assert_same(a, expected)
        assert_same(b, expected)


def test_a_stored_stream_trains_and_is_measured_with_its_model(llama: Any, tmp_path: Path) -> None:
    tokens = sf.load_tokens(token_ids(60, 16), held_out_fraction=0.2)
    stream = sf.ActivationStream.from_model(llama, tokens, HOOKS, batch_size=64)
    cache(stream, tmp_path / "acts", 700, held_out_tokens=10_000)
    opened = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=64)
    bank = sf.train(
        opened, sf.TopKConfig(k=4), expansion_factors=[2], n_tokens=2000, progress=False
    )
    options = {"n_tokens": 10_000, "model": llama, "ce_tokens": 64, "progress": False}
    live, stored = (sf.measure(bank, one, **options) for one in (stream, opened))
    assert stored.model == live.model
    assert stored.n_tokens == live.n_tokens == tokens.held_out.n_counted
    for a, b in zip(live.rows, stored.rows, strict=True):
        assert b.fvu == pytest.approx(a.fvu, rel=1e-6)
        assert b.ce_loss_recovered == pytest.approx(a.ce_loss_recovered, rel=1e-6)
    assert (opened.context_size, opened.prepend_bos) == (16, False)


def test_held_out_rows_and_contexts_are_as_many_as_were_asked_for(
    llama: Any, tmp_path: Path
) -> None:
    tokens = sf.load_tokens(token_ids(60, 16), held_out_fraction=0.5)
    stream = sf.ActivationStream.from_model(llama, tokens, HOOKS[0], batch_size=64)
    store = cache(stream, tmp_path / "acts", 200, held_out_tokens=40)
    assert (store.n_rows, store.n_held_out_rows) == (200, 40)
    opened = sf.ActivationStream.from_store(tmp_path / "acts")
    assert torch.equal(opened.held_out_tokens.ids, tokens.held_out.ids[:3])
    assert cache(stream, tmp_path / "tenth", 200).n_held_out_rows == 20
    store = cache(stream, tmp_path / "none", 200, held_out_tokens=0)
    assert store.n_held_out_rows == 0
    assert sf.ActivationStream.from_store(tmp_path / "none").held_out_tokens is None
    with pytest.raises(ValueError, match="Nothing was held out"):
        next(sf.ActivationStream.from_store(tmp_path / "none").held_out_batches())


def test_a_bank_from_the_store_is_bitwise_that_of_tensors_in_the_same_order(
    tmp_path: Path,
) -> None:
    cache(numbered(), tmp_path / "acts")
    opened = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=64)
    batches = list(opened.batches(1600))

    in_order = iter(batches)

    class InOrder(BufferedBatches):
        def __next__(self) -> Batch:
            return next(in_order)

    class Given(sf.ActivationStream):
        def batches(self, n_rows: int, *position: Any, **ranks: Any) -> Any:
            return InOrder(self._source, seed=0, batch_size=64, buffer_rows=64, n_rows=n_rows)

    x = joined(batches)
    given = Given.from_tensors(x, batch_size=64, held_out_fraction=0)
    options = {"expansion_factors": [2], "n_tokens": 1600, "progress": False}
    a, b = (sf.train(one, sf.TopKConfig(k=2), **options) for one in (opened, given))
    for key in a:
        assert torch.equal(a[key].W_dec, b[key].W_dec)


def test_reading_holds_no_more_than_a_batch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(4000, 64)
    stream = sf.ActivationStream.from_tensors({"a": x, "b": x}, held_out_fraction=0)
    cache(stream, tmp_path / "acts", rows_per_shard=1000)
    cache(stream, tmp_path / "in_order", rows_per_shard=1000, shuffle=False)
    largest = 0
    empty = torch.empty

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal largest
        tensor = empty(*args, **options)
        largest = max(largest, tensor.nbytes)
        return tensor

    opened = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=50)
    mixed = sf.ActivationStream.from_store(tmp_path / "in_order", batch_size=50, buffer_rows=500)
    assert opened.buffer_bytes == 0
    assert mixed.buffer_bytes <= 16 * (500 + 4000 // 64)
    monkeypatch.setattr(torch, "empty", counted)
    for one in (opened, mixed):
        for batch in one.batches(8000):
            # Of its own memory, and not a view of a whole shard.
            assert batch["a"].untyped_storage().nbytes() == batch["a"].nbytes
    assert largest == 50 * 64 * 4


# Damage.


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def test_verify_names_the_file_with_a_flipped_byte(tmp_path: Path) -> None:
    store = cache(numbered(), tmp_path / "acts")
    store.verify()
    for name in ("shard-00003.safetensors", "shard-00005.safetensors"):
        for place in (0, 200, -1):
            flip(tmp_path / "acts" / name, place)
            with pytest.raises(ValueError, match=name) as raised:
                sf.ActivationStore(tmp_path / "acts").verify()
            assert str(raised.value).count("shard-") == 1
            flip(tmp_path / "acts" / name, place)
    store.verify()


def test_verify_names_what_is_missing_or_cut_off(tmp_path: Path) -> None:
    store = cache(numbered(), tmp_path / "acts")
    (tmp_path / "acts" / "shard-00001.safetensors").unlink()
    os.truncate(tmp_path / "acts" / "shard-00002.safetensors", 100)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing; shard-00002"):
        store.verify()


def test_a_missing_or_shortened_shard_is_named_when_the_store_is_opened(tmp_path: Path) -> None:
    cache(numbered(), tmp_path / "acts")
    shard = tmp_path / "acts" / "shard-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"shard-00002.safetensors has .* bytes and not the"):
        sf.ActivationStream.from_store(tmp_path / "acts")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00002.safetensors is missing"):
        sf.ActivationStream.from_store(tmp_path / "acts")


def with_header(path: Path, change: Any) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    header.pop("__metadata__")  # Makes room, so that the file keeps its size.
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    assert len(text) == size
    path.write_bytes(data[:8] + text + data[8 + size :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(dtype="F16"), "F16"),
        (lambda h: h["a"].update(shape=[5, 100]), "promises"),
        (lambda h: h["a"].update(shape=[-5, -100]), "natural number"),
        (lambda h: h["a"].update(data_offsets=[0, 2**60]), "bytes are not"),
        (lambda h: h["a"].update(data_offsets=[10**8, 10**8 + 2000]), "ends before"),
        (lambda h: h.pop("b"), "nothing as 'b'"),
        (lambda h: h.update(a=[]), "no valid safetensors header"),
    ],
)
def test_a_shard_whose_header_lies_is_an_error_before_it_is_loaded(
    change: Any, message: str, tmp_path: Path
) -> None:
    cache(numbered(), tmp_path / "acts")
    for number in range(10):
        with_header(tmp_path / "acts" / f"shard-{number:05d}.safetensors", change)
    stream = sf.ActivationStream.from_store(tmp_path / "acts")
    with pytest.raises(ValueError, match=message):
        next(iter(stream))


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    cache(numbered(), tmp_path / "acts")
    for path in (tmp_path / "acts").glob("shard-*"):
        path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="header claims 4611686018427387904 bytes"):
        next(iter(sf.ActivationStream.from_store(tmp_path / "acts")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(format_version=2), "format version 2"),
        (lambda i: i.update(format="other"), "not the index of an activation store"),
        (lambda i: i["shards"][0].update(file="../shard-00000.safetensors"), "damaged"),
        (lambda i: i["shards"][0].update(file="/etc/passwd"), "damaged"),
        (lambda i: i["shards"][0].update(n_rows=-1), "damaged"),
        (lambda i: i["shards"][1].update(file="shard-00000.safetensors"), "named twice"),
        (lambda i: i.pop("hooks"), "damaged"),
        (lambda i: i.update(dtype="float8"), "float8"),
        (lambda i: i.update(hooks=["a"]), "hooks"),
        (lambda i: i.update(widths=7), "widths in .* should be dict"),
    ],
)
def test_an_index_is_checked_before_it_is_trusted(
    change: Any, message: str, tmp_path: Path
) -> None:
    cache(numbered(), tmp_path / "acts")
    path = tmp_path / "acts" / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    before = {one.name: one.read_bytes() for one in path.parent.iterdir()}
    for use in (
        sf.ActivationStream.from_store,
        sf.ActivationStore,
        lambda folder: cache(numbered(), folder, resume=True),
    ):
        with pytest.raises(ValueError, match=message):
            use(tmp_path / "acts")
    assert before == {one.name: one.read_bytes() for one in path.parent.iterdir()}


def test_what_is_no_store_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no store"):
        sf.ActivationStream.from_store(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text('{"form')
    with pytest.raises(ValueError, match=r"index.json is not valid JSON"):
        sf.ActivationStream.from_store(tmp_path)


# Resuming, appending, and what is refused.


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    cache(numbered(), tmp_path / "acts", 200)
    before = {path.name: path.read_bytes() for path in (tmp_path / "acts").iterdir()}
    with pytest.raises(FileExistsError, match="resume=True"):
        cache(numbered(), tmp_path / "acts")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for options in ({}, {"resume": True}, {"append": True}):
        with pytest.raises(FileExistsError, match="holds files"):
            cache(numbered(), tmp_path / "notes", **options)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "acts").iterdir()}
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_resuming_makes_a_store_longer_and_ends_as_if_written_at_once(tmp_path: Path) -> None:
    for n_tokens in (230, 230, 700):
        cache(numbered(), tmp_path / "acts", n_tokens, held_out_tokens=n_tokens // 10, resume=True)
    cache(numbered(), tmp_path / "whole", 700)
    assert_same(in_order(tmp_path / "acts"), in_order(tmp_path / "whole"))
    held_out = [
        joined(sf.ActivationStream.from_store(tmp_path / name).held_out_batches())
        for name in ("acts", "whole")
    ]
    assert_same(*held_out)


def test_resuming_with_another_stream_is_refused(tmp_path: Path) -> None:
    cache(numbered(), tmp_path / "acts", 300)
    before = in_order(tmp_path / "acts")
    with pytest.raises(ValueError, match="seed 0 then, 1 now"):
        cache(numbered(seed=1), tmp_path / "acts", 500, resume=True)
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(1))
    other = sf.ActivationStream.from_tensors(
        {"a": x, "b": x[:, :3]}, batch_size=64, held_out_fraction=0.2
    )
    with pytest.raises(ValueError, match="first rows of a are others"):
        cache(other, tmp_path / "acts", 500, resume=True)
    assert_same(in_order(tmp_path / "acts"), before)


def test_appending_adds_the_rows_of_another_stream(tmp_path: Path) -> None:
    cache(numbered(), tmp_path / "acts", 300)
    cache(numbered(seed=1), tmp_path / "acts", 250, append=True)
    rows = in_order(tmp_path / "acts")["a"]
    assert torch.equal(rows[:300], joined(numbered())["a"][:300])
    assert torch.equal(rows[300:], joined(numbered(seed=1))["a"][:250])
    store = sf.ActivationStore(tmp_path / "acts")
    assert [run.seed for run in store.index.runs] == [0, 1]
    store.verify()
    with pytest.raises(ValueError, match="Set one of them"):
        cache(numbered(), tmp_path / "acts", append=True, resume=True)


def test_contexts_of_an_appended_stream_join_those_that_are_there(
    llama: Any, tmp_path: Path
) -> None:
    streams = []
    for seed in (0, 1):
        tokens = sf.load_tokens(token_ids(20, 8, seed=seed), held_out_fraction=0.2)
        streams.append(sf.ActivationStream.from_model(llama, tokens, HOOKS[0], batch_size=16))
        cache(streams[-1], tmp_path / "acts", append=True)
    opened = sf.ActivationStream.from_store(tmp_path / "acts")
    expected = torch.cat([stream.held_out_tokens.ids for stream in streams])
    assert torch.equal(opened.held_out_tokens.ids, expected)


@pytest.mark.parametrize("how", ["resume", "append"])
def test_a_store_of_another_model_hook_or_dtype_is_refused(
    how: str, llama: Any, tmp_path: Path
) -> None:
    def stream(hooks: Any = HOOKS[0], name: str = "one", size: int = 8) -> sf.ActivationStream:
        tokens = sf.load_tokens(token_ids(20, size))
        made = sf.ActivationStream.from_model(llama, tokens, hooks, batch_size=16)
        made.model_name = name
        return made

    cache(stream(), tmp_path / "acts")
    before = in_order(tmp_path / "acts")
    for other, options, message in (
        (stream(name="two"), {}, "model 'one', and this stream has 'two'"),
        (stream(hooks=HOOKS), {}, "hooks"),
        (stream(size=16), {}, "context_size 8"),
        (stream(), {"dtype": "int8"}, "dtype 'float32'"),
    ):
        with pytest.raises(ValueError, match=message):
            cache(other, tmp_path / "acts", **{how: True}, **options)
    assert_same(in_order(tmp_path / "acts"), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"held_out_tokens": -1}, "held_out_tokens=-1"),
        ({"rows_per_shard": 0}, "rows_per_shard=0"),
        ({"dtype": "float8"}, "dtype='float8'"),
    ],
)
def test_a_bad_option_is_an_error_that_leaves_nothing(
    options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        cache(numbered(), tmp_path / "acts", **options)
    assert not (tmp_path / "acts").exists()


def test_hooks_must_not_be_called_what_a_shard_calls_its_tokens(tmp_path: Path) -> None:
    stream = sf.ActivationStream.from_tensors({"positions": torch.ones(50, 2)})
    with pytest.raises(ValueError, match="must not be called 'positions'"):
        cache(stream, tmp_path / "acts")


# Two writers, kills and full disks.


@pytest.mark.parametrize("url", ["{folder}/acts", "memory://two-writers"])
def test_a_second_writer_is_refused(url: str, tmp_path: Path) -> None:
    place = url.format(folder=tmp_path)
    x = torch.ones(400, 2)

    class Nested(sf.ActivationStream):
        refused = False

        def epoch(self, **options: Any) -> Any:
            for options_ in ({}, {"resume": True}, {"append": True}):
                with pytest.raises((BlockingIOError, FileExistsError), match=r"writ"):
                    cache(sf.ActivationStream.from_tensors({"a": x}), place, **options_)
            with pytest.raises(BlockingIOError, match=f"process {os.getpid()} of host"):
                cache(sf.ActivationStream.from_tensors({"a": x}), place, resume=True)
            self.refused = True
            yield from super().epoch(**options)

    stream = Nested.from_tensors({"a": x})
    store = cache(stream, place)
    assert stream.refused
    assert store.n_rows == 360
    store.verify()
    assert ".lock" not in store._folder.sizes()


def dead_process() -> int:
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    return finished.pid


@pytest.mark.parametrize("url", ["{folder}/acts", "memory://dead-writer"])
def test_the_lock_of_a_dead_process_is_taken_over_with_a_warning(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = url.format(folder=tmp_path)
    store = cache(numbered(), place, 200)
    pid = dead_process()
    owner = {"pid": pid, "host": socket.gethostname(), "token": "x"}
    store._folder.write(".lock", json.dumps(owner).encode())
    with caplog.at_level(logging.WARNING):
        assert cache(numbered(), place, 300, resume=True).n_rows == 300
    assert f"Process {pid}" in caplog.text
    owner["host"] = "elsewhere"
    store._folder.write(".lock", json.dumps(owner).encode())
    with pytest.raises(BlockingIOError, match=r"of host elsewhere.*delete .*\.lock"):
        cache(numbered(), place, 400, resume=True)


def test_of_two_writers_that_displace_a_dead_one_at_once_the_later_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = RemoteFolder("memory://two-heirs")
    owner = {"pid": dead_process(), "host": socket.gethostname(), "token": "x"}
    folder.write(".lock", json.dumps(owner).encode())
    remove = RemoteFolder.remove

    def remove_and_be_overtaken(self: RemoteFolder, name: str) -> None:
        remove(self, name)
        self.write(name, json.dumps(owner | {"pid": os.getpid()}).encode())

    monkeypatch.setattr(RemoteFolder, "remove", remove_and_be_overtaken)
    with pytest.raises(BlockingIOError, match=f"written by process {os.getpid()}"):
        cache(numbered(), "memory://two-heirs", resume=True)


def test_a_writer_whose_lock_is_gone_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store_writer.StoreWriter.flush

    def flush_after_theft(self: Any, split: str) -> None:
        (tmp_path / "acts" / ".lock").unlink(missing_ok=True)
        write(self, split)

    monkeypatch.setattr(store_writer.StoreWriter, "flush", flush_after_theft)
    with pytest.raises(BlockingIOError, match="is gone"):
        cache(numbered(), tmp_path / "acts")
    assert not list((tmp_path / "acts").glob("shard-*"))


WRITER = """
import sys, torch, saefeat as sf
from test_store import numbered
sf.cache_activations(
    numbered(60_000), sys.argv[1], rows_per_shard=100, resume=True, progress=False
)
print("done")
"""


def test_a_writer_that_is_killed_for_real_is_resumed_to_the_same_rows(tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    command = [sys.executable, "-c", WRITER, str(folder)]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(sf.__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    n_shards = 0
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("shard-*"))) < n_shards + 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert b"done" not in output, "it was too quick to be killed"
        store = sf.ActivationStore(folder)
        store.verify()
        assert len(store.index.shards) > n_shards
        n_shards = len(store.index.shards)
    stream = numbered(60_000)
    n_tokens = store.n_rows + 1000
    cache(stream, folder, n_tokens, resume=True)
    assert torch.equal(in_order(folder)["a"], joined(stream)["a"][:n_tokens])
    assert not list(folder.glob(".*"))


# The index before anything, ten shards each with its index, and the index at the end.
N_WRITES = 22


@pytest.mark.parametrize("when", range(N_WRITES))
def test_a_full_disk_loses_nothing_wherever_it_strikes(
    when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(self: Path, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > when:
            with self.open("wb") as file:
                file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        with self.open("wb") as file:
            return file.write(data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left on device") as raised:
            cache(numbered(), tmp_path / "acts")
    assert raised.value.errno == errno.ENOSPC
    message = str(raised.value)
    index = tmp_path / "acts" / "index.json"
    n_safe = sf.ActivationStore(tmp_path / "acts").n_rows if index.exists() else 0
    assert f"{n_safe} training rows are safe" in message
    assert "resume=True" in message
    assert not list((tmp_path / "acts").glob(".*"))
    store = cache(numbered(), tmp_path / "acts", resume=True)
    store.verify()
    assert_same(in_order(tmp_path / "acts"), joined(numbered()))


def test_links_that_lead_nowhere_are_no_files_of_a_store(tmp_path: Path) -> None:
    cache(numbered(), tmp_path / "acts")
    # As editors leave them to say who has a file open.
    (tmp_path / "acts" / ".#index.json").symlink_to("me@host.1")
    assert sf.ActivationStream.from_store(tmp_path / "acts").hooks == ["a", "b"]
    shard = tmp_path / "acts" / "shard-00001.safetensors"
    shard.unlink()
    shard.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing"):
        sf.ActivationStream.from_store(tmp_path / "acts")


# Elsewhere than on this machine's disk.


def test_a_store_at_an_fsspec_url_is_written_read_and_resumed(tmp_path: Path) -> None:
    url = "memory://bucket/acts"
    cache(numbered(), url, 300)
    with pytest.raises(FileExistsError, match="already holds files"):
        cache(numbered(), url, 300)
    store = cache(numbered(), url, resume=True)
    store.verify()
    cache(numbered(), tmp_path / "acts")
    for options in ({}, {"buffer_rows": 300}, {"hooks": "b"}):
        here, there = (
            sf.ActivationStream.from_store(place, batch_size=64, **options)
            for place in (tmp_path / "acts", url)
        )
        for a, b in zip(here.batches(1700), there.batches(1700), strict=True):
            # Rows of a shard that are mixed come side by side here, rows of a block there.
            rows = [x["b"][x["b"][:, 0].argsort()] for x in (a, b)]
            assert torch.equal(*rows)
        assert_same(joined(here.held_out_batches()), joined(there.held_out_batches()))


def test_what_is_fetched_at_once_is_bounded_by_what_the_stream_says() -> None:
    url = "memory://bucket/bounded"
    cache(numbered(2000), url, shuffle=False)
    stream = sf.ActivationStream.from_store(url, batch_size=64, buffer_rows=200)
    for _ in stream:
        held = sum(x.nbytes for x in stream._source._files._held.values())  # type: ignore
        assert 0 < held <= stream.buffer_bytes < 1600 * 32


def test_a_shard_that_cannot_be_fetched_is_the_error_of_its_file_system() -> None:
    url = "memory://bucket/lost"
    store = cache(numbered(), url, shuffle=False)
    stream = sf.ActivationStream.from_store(url, batch_size=64)
    batches = iter(stream.epoch(shuffle=False))
    next(batches)
    for one in store.index.shards:
        store._folder.remove(one.file)
    with pytest.raises(FileNotFoundError, match="lost/shard-"):
        list(batches)


def test_damage_at_a_url_is_found_and_named() -> None:
    url = "memory://bucket/damaged"
    store = cache(numbered(), url)
    name = "shard-00004.safetensors"
    data = bytearray(store._folder.read(name))
    data[-1] ^= 1
    store._folder.write(name, bytes(data))
    with pytest.raises(ValueError, match=name):
        store.verify()
    store._folder.remove(name)
    with pytest.raises(FileNotFoundError, match=f"{url}/{name} is missing"):
        sf.ActivationStream.from_store(url)


def test_a_store_is_read_from_a_web_server(tmp_path: Path) -> None:
    web = pytest.importorskip("aiohttp.web")
    cache(numbered(), tmp_path / "acts")
    app = web.Application()
    app.router.add_static("/", tmp_path, show_index=True)
    loop, runner, ports = asyncio.new_event_loop(), web.AppRunner(app), Queue[int]()

    def serve() -> None:
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        ports.put(runner.addresses[0][1])
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    server = threading.Thread(target=serve)
    server.start()
    try:
        url = f"http://127.0.0.1:{ports.get(timeout=60)}/acts"
        sf.ActivationStore(url).verify()
        here = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=64)
        assert_same(joined(here), joined(sf.ActivationStream.from_store(url, batch_size=64)))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        server.join()


@pytest.fixture(scope="module")
def s3() -> Any:
    """Storage options of a local S3 server that has a bucket."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "a", "secret": "b", "endpoint_url": f"http://{host}:{port}"}
    fsspec.filesystem("s3", **options).mkdir("bucket")
    yield options
    server.stop()


def test_a_store_in_s3_is_written_read_and_resumed(s3: Any, tmp_path: Path) -> None:
    url = "s3://bucket/deep/acts"
    cache(numbered(), url, 200, storage_options=s3)
    with pytest.raises(FileExistsError, match="already holds files"):
        cache(numbered(), url, 200, storage_options=s3)
    store = cache(numbered(), url, 400, resume=True, storage_options=s3)
    store.verify()
    cache(numbered(), tmp_path / "acts", 400)
    here = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=64)
    there = sf.ActivationStream.from_store(url, batch_size=64, storage_options=s3)
    assert_same(joined(here), joined(there))
    name = "shard-00002.safetensors"
    store._folder.remove(name)
    with pytest.raises(FileNotFoundError, match=f"{url}/{name} is missing"):
        sf.ActivationStream.from_store(url, storage_options=s3)


def test_a_second_writer_to_s3_is_refused(s3: Any) -> None:
    url = "s3://bucket/locked"
    store = cache(numbered(), url, 100, storage_options=s3)
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "token": "other"}
    store._folder.write(".lock", json.dumps(owner).encode())
    with pytest.raises(BlockingIOError, match="one writer at a time"):
        cache(numbered(), url, 200, resume=True, storage_options=s3)
