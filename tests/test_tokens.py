"""Packing documents into contexts: exact layouts on a tokenizer whose ids can be read off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import token_ids

from saefeat.activations.tokens import Tokens, load_tokens

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tiny_models import tiny_tokenizer
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def words(ids: Any) -> str:
    return " ".join(f"w{i}" for i in ids)


def documents(n: int, length: int) -> list[str]:
    """n documents, the i-th being `length` times the word with id 3 + i."""
    return [words([3 + i] * length) for i in range(n)]


def test_one_document_is_packed_behind_a_bos_in_each_context(tokenizer: Any) -> None:
    tokens = load_tokens([words(range(3, 14))], tokenizer, 4, held_out_fraction=0)
    expected = [[BOS, 3, 4, 5], [BOS, 6, 7, 8], [BOS, 9, 10, 11]]
    assert tokens.ids.tolist() == expected, "11 tokens fill three contexts; two are left over"
    assert tokens.counts.tolist() == [[False, True, True, True]] * 3
    assert (tokens.context_size, tokens.n_contexts, tokens.n_counted) == (4, 3, 9)
    assert tokens.prepend_bos
    assert tokens.n_held_out == 0
    assert tokens.attention_mask is None
    assert tokens.tokenizer_name == tokenizer.name_or_path


def test_documents_are_separated_by_an_eos_that_does_not_count(tokenizer: Any) -> None:
    tokens = load_tokens(
        documents(2, 3), tokenizer, 7, held_out_fraction=0, prepend_bos=False, seed=0
    )
    (ids,) = tokens.ids.tolist()
    assert ids in ([3, 3, 3, EOS, 4, 4, 4], [4, 4, 4, EOS, 3, 3, 3])
    assert tokens.counts.tolist() == [[True, True, True, False, True, True, True]]
    assert not tokens.prepend_bos


def test_special_positions_are_known_by_place_and_not_by_id(tokenizer: Any) -> None:
    tokens = load_tokens(["w3 <eos> <bos> w4"], tokenizer, 5, held_out_fraction=0)
    assert tokens.ids.tolist() == [[BOS, 3, EOS, BOS, 4]]
    assert tokens.counts.tolist() == [[False, True, True, True, True]]


def test_the_seed_decides_the_order_of_documents(tokenizer: Any) -> None:
    def order(seed: int) -> list[int]:
        return load_tokens(documents(20, 5), tokenizer, 6, seed=seed).ids[:, 1].tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != sorted(order(0))


def test_no_document_is_both_trained_on_and_held_out(tokenizer: Any) -> None:
    for seed in range(5):
        tokens = load_tokens(documents(40, 13), tokenizer, 8, held_out_fraction=0.2, seed=seed)
        train, held_out = tokens.train, tokens.held_out
        assert train.n_contexts + held_out.n_contexts == tokens.n_contexts
        assert 0.1 < held_out.n_contexts / tokens.n_contexts < 0.4
        seen = set(train.ids[train.counts].tolist())
        assert seen.isdisjoint(held_out.ids[held_out.counts].tolist())
        assert train.n_held_out == held_out.n_held_out == 0


def test_a_single_document_is_cut_by_position(tokenizer: Any) -> None:
    tokens = load_tokens([words([3] * 60 + [4] * 10)], tokenizer, 8, held_out_fraction=0.1)
    assert (tokens.train.n_contexts, tokens.held_out.n_contexts) == (9, 1)
    assert tokens.held_out.ids.tolist() == [[BOS] + [4] * 7]


def test_one_long_document_among_short_ones_does_not_upset_the_share(tokenizer: Any) -> None:
    for seed in range(6):
        tokens = load_tokens(
            [words([3] * 1000), words([4] * 9), words([5] * 9)], tokenizer, 8, seed=seed
        )
        assert 0.04 < tokens.n_held_out / tokens.n_contexts < 0.21


def test_two_contexts_leave_one_to_train_on_and_one_context_is_not_split(tokenizer: Any) -> None:
    for fraction in (0.01, 0.5, 0.99):
        tokens = load_tokens([words([3] * 14)], tokenizer, 8, held_out_fraction=fraction)
        assert (tokens.train.n_contexts, tokens.held_out.n_contexts) == (1, 1)
    assert load_tokens([words([3] * 13)], tokenizer, 8).n_held_out == 0


def test_no_more_than_max_tokens_are_used_and_the_rest_is_not_read(tokenizer: Any) -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield {"text": words([3 + read % 40] * 5000)}

    tokens = load_tokens(endless(), tokenizer, 8, max_tokens=1000)
    assert tokens.ids.numel() == 1000
    assert read < 50


def test_files_and_folders_give_one_document_a_file(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("w3 w3 w3")
    (tmp_path / "deep" / "b.txt").write_text("w4 w4 w4")
    (tmp_path / "c.md").write_text("w5 w5 w5")
    options = {"context_size": 4, "held_out_fraction": 0}
    one = load_tokens(tmp_path / "a.txt", tokenizer, **options)
    assert one.ids.tolist() == [[BOS, 3, 3, 3]]
    every = load_tokens(str(tmp_path), tokenizer, **options)
    assert set(every.ids.flatten().tolist()) == {BOS, EOS, 3, 4, 5}
    text_files = load_tokens(tmp_path, tokenizer, pattern="**/*.txt", **options)
    assert set(text_files.ids.flatten().tolist()) == {BOS, EOS, 3, 4}


def test_long_documents_are_cut_at_line_breaks_before_they_are_tokenised(tokenizer: Any) -> None:
    lines = "\n".join(words([3 + i % 40] * 10) for i in range(9000))
    assert len(lines) > 3 << 16
    tokens = load_tokens([lines], tokenizer, 9, held_out_fraction=0, prepend_bos=False)
    expected = torch.arange(9000).remainder(40).add(3).repeat_interleave(10)
    assert torch.equal(tokens.ids.flatten(), expected)
    assert bool(tokens.counts.all())


def test_hugging_face_data_sets_are_read_whole_or_streaming(tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": text, "title": "w9"} for text in documents(10, 7)]
    whole = datasets.Dataset.from_list(rows)
    streaming = datasets.IterableDataset.from_generator(lambda: iter(rows))
    shuffled = load_tokens(whole, tokenizer, 8, held_out_fraction=0)
    assert torch.equal(
        shuffled.ids, load_tokens(documents(10, 7), tokenizer, 8, held_out_fraction=0).ids
    )
    in_order = load_tokens(streaming, tokenizer, 9, held_out_fraction=0)
    assert in_order.ids[:3, 1].tolist() == [3, 4, 5]
    titles = load_tokens(whole, tokenizer, 3, text_column="title", held_out_fraction=0)
    assert set(titles.ids[titles.counts].tolist()) == {9}
    with pytest.raises(ValueError, match=r"'body'.*\['text', 'title'\]"):
        load_tokens(whole, tokenizer, 8, text_column="body")


def test_a_data_set_of_token_ids_needs_no_tokenizer() -> None:
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7]}]
    tokens = load_tokens(rows, context_size=3, held_out_fraction=0)
    assert tokens.ids.tolist() == [[5, 6, 7], [5, 6, 7]]
    assert bool(tokens.counts.all())
    assert not tokens.prepend_bos


def test_a_tensor_is_taken_as_it_is_and_its_last_rows_are_held_out() -> None:
    ids = token_ids(20, 6)
    tokens = load_tokens(ids)
    assert torch.equal(tokens.ids, ids)
    assert bool(tokens.counts.all())
    assert not tokens.prepend_bos
    assert torch.equal(tokens.held_out.ids, ids[18:])
    assert torch.equal(tokens.train.ids, ids[:18])
    assert load_tokens(ids, max_tokens=20).n_contexts == 3


def test_padding_and_bos_of_a_tensor_do_not_count(tokenizer: Any) -> None:
    ids = token_ids(4, 6)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, :2] = 0
    ids[:, 0] = BOS
    ids[1, 2] = BOS
    for options in ({"tokenizer": tokenizer}, {"prepend_bos": True}):
        tokens = load_tokens(ids, attention_mask=mask, held_out_fraction=0.25, **options)
        expected = mask.bool()
        expected[[0, 2, 3], 0] = False
        expected[1, 2] = False
        assert torch.equal(tokens.counts, expected)
        assert tokens.attention_mask is not None
        assert torch.equal(tokens.attention_mask, mask.bool())
        assert tokens.prepend_bos
        assert tokens.held_out.attention_mask is not None
    assert torch.equal(load_tokens(ids, attention_mask=mask).counts, mask.bool())


def test_a_tokenizer_without_bos_is_used_without_and_refused_where_one_is_demanded() -> None:
    from tiny_models import tiny_tokenizer

    bare = tiny_tokenizer()
    bare.bos_token = None
    tokens = load_tokens(documents(1, 8), bare, 4, held_out_fraction=0)
    assert tokens.ids.tolist() == [[3] * 4] * 2
    assert not tokens.prepend_bos
    with pytest.raises(ValueError, match="neither"):
        load_tokens(documents(1, 8), bare, 4, prepend_bos=True)


def test_an_encoder_begins_with_cls_and_separates_by_sep() -> None:
    from tiny_models import tiny_tokenizer

    encoder = tiny_tokenizer()
    encoder.add_special_tokens({"cls_token": "w48", "sep_token": "w49"})
    tokens = load_tokens(documents(2, 3), encoder, 8, held_out_fraction=0)
    assert tokens.ids[0, 0] == 48
    assert tokens.ids[0, 4] == 49


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ([], {}, ValueError, "empty"),
        (["", "  "], {}, ValueError, "holds 0 tokens.*empty"),
        (["w3 w4"], {"context_size": 8}, ValueError, "holds 2 tokens, less than the 7"),
        (["w3"], {"tokenizer": None}, ValueError, "tokenizer=model.tokenizer"),
        ("missing.txt", {}, FileNotFoundError, "put it in a list"),
        ({"train": ["w3"]}, {}, TypeError, r"\['train'\].*one split"),
        (7, {}, TypeError, "int holds no documents"),
        ([3, 4], {}, TypeError, "int tensor"),
        (["w3"], {"held_out_fraction": 1.0}, ValueError, "held_out_fraction=1.0"),
        (["w3"], {"context_size": 1}, ValueError, "context_size=1"),
        (["w3"], {"context_size": 8, "max_tokens": 7}, ValueError, "max_tokens=7"),
        (token_ids(4, 8), {"max_tokens": 7}, ValueError, "max_tokens=7"),
        (token_ids(4, 8)[0], {}, ValueError, "no contexts"),
        (token_ids(4, 8).float(), {}, ValueError, "no contexts"),
    ],
)
def test_bad_input_is_one_clear_error(
    tokenizer: Any, source: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_tokens(source, **({"tokenizer": tokenizer} | options))


def test_files_that_are_no_text_are_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.png is not UTF-8.*pattern"):
        load_tokens(tmp_path, tokenizer)
    with pytest.raises(FileNotFoundError, match=r"\*\.txt"):
        load_tokens(tmp_path, tokenizer, pattern="*.txt")


def test_a_file_that_is_no_text_among_others_is_left_out_with_a_warning(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latin-1.txt").write_bytes("w3 é w4".encode("latin-1"))
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 w7 w8 w9 w10")
    tokens = load_tokens(tmp_path, tokenizer, context_size=4)
    assert tokens.n_contexts == 2
    assert "Left out" in caplog.text
    assert "latin-1.txt is not UTF-8" in caplog.text


def test_the_parts_of_tokens_are_tokens() -> None:
    assert isinstance(load_tokens(token_ids(4, 8)).train, Tokens)
