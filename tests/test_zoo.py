"""Training small models: to a loss, through interruptions, and never twice."""

import json
import math
from dataclasses import replace

import pytest
import torch

import saefeat as sf
from saefeat.core.files import read_tensors
from saefeat.metrics.loss_recovered import CrossEntropy
from saefeat.models.zoo import (
    A,
    B,
    Shape,
    TrainingOptions,
    load_text,
    random_model,
    read_model,
    train_family,
    train_model,
)
from saefeat.models.zoo.corpus import tokenised
from saefeat.models.zoo.target import next_step

DEEP, FLAT = Shape(2, 16, 1), Shape(1, 24, 2)
OPTIONS = TrainingOptions(
    n_tokens=120 * 256,
    context_size=32,
    contexts_per_step=8,
    n_snapshots=8,
    dtype="float32",
    validation_tokens=8192,
)


@pytest.fixture(scope="module")
def corpus():
    documents = [f"{i} is {'even' if i % 2 == 0 else 'odd'}; twice {2 * i}\n" for i in range(4000)]
    return tokenised(load_text(documents, held_out_fraction=0.1))


class StopError(Exception):
    pass


def weights(model):
    return read_tensors(model.folder / "model.safetensors")


def test_a_run_that_was_stopped_ends_with_the_same_bits(corpus, tmp_path):
    whole = train_model(DEEP, corpus, options=OPTIONS, out=tmp_path / "whole", progress=False)
    n_steps = 0

    def stop(more, shown):
        nonlocal n_steps
        n_steps += more
        if n_steps == 60:
            raise StopError

    with pytest.raises(StopError):
        train_model(DEEP, corpus, options=OPTIONS, out=tmp_path / "cut", progress=stop)
    resumed_steps = []
    again = train_model(
        DEEP,
        corpus,
        options=OPTIONS,
        out=tmp_path / "cut",
        progress=lambda more, shown: resumed_steps.append((more, shown)),
    )
    # The first is told of at once, without a loss: they were made before the stop.
    assert resumed_steps[0][0] > 40
    assert not resumed_steps[0][1]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name


def test_damaged_snapshots_are_passed_over_with_a_warning(corpus, tmp_path, caplog):
    decayed = []
    for name in ("sound", "damaged"):
        whole = train_model(DEEP, corpus, options=OPTIONS, out=tmp_path / name, progress=False)
        if name == "damaged":
            for file in sorted((whole.folder.parent / "stable").iterdir())[1:]:
                file.write_bytes(file.read_bytes()[:1000])
        target = whole.validation_loss * 1.02
        decayed.append(
            train_model(
                DEEP,
                corpus,
                options=OPTIONS,
                out=tmp_path / name,
                target_loss=target,
                progress=False,
            )
        )
    assert "damaged" in caplog.text
    assert decayed[0].n_tokens == decayed[1].n_tokens < OPTIONS.n_tokens
    for name, value in weights(decayed[0]).items():
        assert torch.equal(value, weights(decayed[1])[name]), name


def test_a_family_has_one_loss_and_is_trained_once(corpus, tmp_path):
    options = replace(OPTIONS, n_tokens=400 * 256)
    text = load_text(
        [f"{i} is {'even' if i % 2 == 0 else 'odd'}; twice {2 * i}\n" for i in range(4000)],
        held_out_fraction=0.1,
    )

    def train():
        return train_family(
            (DEEP, FLAT), (0, 1), options, text=text, out=tmp_path, processes=2, progress=False
        )

    family = train()
    assert [(one.shape, one.seed) for one in family.equal_loss] == [
        (shape, seed) for shape in (DEEP, FLAT) for seed in (0, 1)
    ]
    whole = [one.validation_loss for one in family.equal_tokens]
    assert family.target_loss == max(whole) > 1.005 * min(whole), "nothing had to be matched"
    assert not family.misses
    for model in family.equal_loss:
        assert model.validation_loss == pytest.approx(family.target_loss, rel=0.005)
        # By TransformerLens, on the same text: what the record says is the model's loss.
        loaded = model.load(dtype="float32", device="cpu")
        tokens = sf.load_tokens(
            [one.decode() for one in text.held_out], loaded.tokenizer, 32, held_out_fraction=0.9
        )
        loss = CrossEntropy(loaded, tokens.held_out.first(200)).clean()
        assert loss == pytest.approx(model.validation_loss, rel=0.05)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert train().to_dict() == family.to_dict()
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}


def test_another_order_of_words_is_another_model(corpus, tmp_path):
    one, other = (
        train_model(DEEP, corpus, seed=seed, options=OPTIONS, out=tmp_path, progress=False)
        for seed in (0, 1)
    )
    assert one.folder.parent != other.folder.parent
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights(one).values(), weights(other).values(), strict=True)
    )


def test_the_record_says_how_the_model_was_made(corpus, tmp_path):
    model = train_model(DEEP, corpus, options=OPTIONS, out=tmp_path, progress=False)
    record = model.record()
    assert record["shape"] == [2, 16, 1]
    assert record["options"]["n_tokens"] == OPTIONS.n_tokens
    assert record["options"]["learning_rate"] > 0
    assert record["n_tokens"] == OPTIONS.n_tokens
    losses = [row[2] for row in record["curve"]["rows"]]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == OPTIONS.n_snapshots
    assert read_model(model.folder).validation_loss == model.validation_loss
    path = model.folder / "zoo.json"
    path.write_text(json.dumps({"shape": [2, 16, 1]}))
    with pytest.raises(ValueError, match="lacks the key"):
        read_model(model.folder)


def test_a_rate_that_is_too_high_is_named_as_the_cause(corpus, tmp_path):
    options = replace(OPTIONS, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        train_model(DEEP, corpus, options=options, out=tmp_path, progress=False)


def test_too_little_text_is_an_error(tmp_path):
    corpus = tokenised(load_text(["a few words, and then a few more", "of them"]))
    with pytest.raises(ValueError, match="Give more text"):
        train_model(DEEP, corpus, options=OPTIONS, out=tmp_path, progress=False)


def test_tokens_of_another_vocabulary_are_an_error(corpus, tmp_path):
    options = replace(OPTIONS, vocabulary_size=300)
    with pytest.raises(ValueError, match="vocabulary_size=300"):
        train_model(DEEP, corpus, options=options, out=tmp_path, progress=False)


def test_a_family_may_be_left_at_equal_tokens(corpus, tmp_path):
    text = load_text(["some words, " * 900, "and others; " * 100])
    options = replace(OPTIONS, n_tokens=2 * 256)
    family = train_family(
        (DEEP,), (0,), options, text=text, out=tmp_path, equal_loss=False, progress=False
    )
    assert family.equal_loss == ()
    (only,) = family.to_dict()["models"]
    assert only["validation_loss_of_all"] == family.equal_tokens[0].validation_loss
    assert "validation_loss" not in only


def test_a_family_of_nothing_or_of_one_twice_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="shapes"):
        train_family((), (0,), out=tmp_path)
    with pytest.raises(ValueError, match="seeds"):
        train_family((A, B), (0, 0), out=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": 0},
        {"n_tokens": 1024},
        {"decay_fraction": 1.0},
        {"learning_rate": -1.0},
        {"dtype": "float8"},
        {"vocabulary_size": 100},
    ],
)
def test_options_out_of_range_are_errors(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(TrainingOptions(), **change)


def test_a_decay_is_looked_for_between_those_that_were_too_early_and_too_late():
    assert next_step({100: 2.0}, 2.2, 0.2, least=10) == 62  # 100 (2 / 2.2)^(1 / 0.2)
    between = next_step({100: 2.0, 25: 2.88}, 2.4, 0.2, least=10)
    assert between == 50  # half-way in ln(loss), so in ln(step)
    assert next_step({100: 2.0, 99: 2.5}, 2.2, 0.2, least=10) is None


def test_a_random_model_is_one_of_a_shape_that_has_learnt_nothing():
    model = random_model(FLAT, 0, dtype="float32", device="cpu")
    assert (model.cfg.n_layers, model.cfg.d_model) == (1, 24)
    ids = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(model(ids, return_type="loss"))
    assert loss == pytest.approx(math.log(257), abs=0.3)
    other = random_model(FLAT, 1, dtype="float32", device="cpu")
    assert not torch.equal(model(ids), other(ids))


@pytest.mark.parametrize(("name", "shape"), [("tiny-a", A), ("tiny-b", B)])
def test_a_packaged_model_is_small_and_has_learnt(name, shape):
    model = sf.load_model(name, device="cpu", dtype="float32")
    assert (model.cfg.n_layers, model.cfg.d_model) == (shape.n_layers, shape.d_model)
    assert model.cfg.model_name == name
    text = load_text()
    tokens = sf.load_tokens(
        [one.decode(errors="replace") for one in text.held_out],
        model.tokenizer,
        64,
        max_tokens=64 * 256,
        held_out_fraction=0.5,
    )
    assert CrossEntropy(model, tokens.held_out).clean() < 1.7
    from saefeat.models.packaged import packaged_folder

    folder = packaged_folder(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    assert read_model(folder).shape == shape
    assert "call" in read_model(folder).record()
