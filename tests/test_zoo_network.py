"""The compiled decoder against transformers' GPT-2, and what it is trained on."""

import math

import numpy as np
import pytest
import torch

from saefeat.models.zoo import A, B, Shape, budget, load_text
from saefeat.models.zoo.decoder import initial_weights, write_model
from saefeat.models.zoo.network import Network, named_views, parameter_sizes
from saefeat.models.zoo.tokenizer import (
    BYTE_VOCABULARY,
    END_OF_TEXT,
    byte_tokenizer,
    encode,
    trained_tokenizer,
)
from saefeat.models.zoo.windows import Windows

SMALL = Shape(2, 24, 3)
CONTEXTS, CONTEXT_SIZE = 3, 16


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(BYTE_VOCABULARY, (CONTEXTS, CONTEXT_SIZE), generator=generator)
    targets = torch.randint(BYTE_VOCABULARY, (CONTEXTS, CONTEXT_SIZE), generator=generator)
    return ids, targets


def rough_weights(shape):
    """Not at zero biases and unit gains, where a wrong gradient of theirs would not show."""
    weights = initial_weights(shape, seed=0, context_size=CONTEXT_SIZE)
    return weights + 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))


def network(weights, dtype, shape=SMALL):
    return Network(
        shape,
        weights,
        vocabulary_size=BYTE_VOCABULARY,
        context_size=CONTEXT_SIZE,
        n_contexts=CONTEXTS,
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' model of the same weights in float64."""
    from transformers import GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("reference")
    write_model(
        folder,
        SMALL,
        rough_weights(SMALL),
        tokenizer=byte_tokenizer().to_str(),
        context_size=CONTEXT_SIZE,
        record={},
    )
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").double().eval()


def reference_loss(model, ids, targets):
    logits = model(ids).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_loss_and_every_gradient_are_those_of_transformers(reference, dtype, tolerance):
    ids, targets = batch()
    weights = rough_weights(SMALL)
    ours = network(weights, dtype)
    loss = ours.loss_and_gradient(ids, targets)
    reference.zero_grad()
    expected = reference_loss(reference, ids, targets)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=tolerance)
    sizes = parameter_sizes(SMALL, BYTE_VOCABULARY, CONTEXT_SIZE)
    parameters = dict(reference.named_parameters())
    assert set(sizes) == set(parameters)
    for name, gradient in named_views(ours.gradient, sizes).items():
        wanted = parameters[name].grad
        error = (gradient.double() - wanted).norm() / wanted.norm()
        assert error < 3 * tolerance, name


def test_logits_without_a_way_back_are_those_of_transformers(reference):
    ids, _ = batch(1)
    only_forward = Network(
        SMALL,
        rough_weights(SMALL),
        vocabulary_size=BYTE_VOCABULARY,
        context_size=CONTEXT_SIZE,
        n_contexts=CONTEXTS,
        dtype=torch.float32,
        backward=False,
    )
    with torch.no_grad():
        expected = reference(ids).logits
    assert (only_forward.logits(ids) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_past_does_not_depend_on_the_future():
    ids, _ = batch()
    ours = network(rough_weights(SMALL), torch.float32)
    before = ours.logits(ids).clone()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % BYTE_VOCABULARY
    after = ours.logits(changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_an_untrained_model_is_about_as_unsure_as_can_be():
    ids, targets = batch()
    ours = network(initial_weights(SMALL, seed=0, context_size=CONTEXT_SIZE), torch.float32)
    assert ours.loss(ids, targets) == pytest.approx(math.log(BYTE_VOCABULARY), abs=0.4)


def test_a_and_b_have_equally_many_parameters():
    assert A.n_parameters == B.n_parameters == 221_184
    assert B.d_model == 2 * A.d_model
    assert 4 * B.n_layers == A.n_layers


def test_a_budget_states_how_far_its_shapes_miss_it():
    for one in budget(1_000_000, aspect_ratios=[2, 8, 32, 128]):
        actual = 12 * one.shape.n_layers * one.shape.d_model**2
        assert one.mismatch_percent == pytest.approx(100 * (actual / 1_000_000 - 1))
        assert abs(one.mismatch_percent) < 5
        assert one.shape.d_model % one.shape.n_heads == 0
    (deep,) = budget(221_184, n_layers=[8])
    assert deep.shape == A
    assert deep.mismatch_percent == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "one of the two"),
        ({"n_layers": [1], "aspect_ratios": [2]}, "one of the two"),
        ({"n_layers": [0]}, "above 0"),
        ({"n_layers": [10**9]}, "width of 0"),
    ],
)
def test_a_budget_that_cannot_be_met_is_an_error(options, words):
    with pytest.raises(ValueError, match=words):
        budget(221_184, **options)


def test_heads_that_do_not_divide_the_width_are_an_error():
    with pytest.raises(ValueError, match="do not divide"):
        Shape(2, 48, 5)


def test_bytes_and_their_ids_are_each_other():
    everything = bytes(range(256))
    tokenizer = byte_tokenizer()
    assert tokenizer.get_vocab_size() == BYTE_VOCABULARY
    ids = encode([everything, "é€😀".encode()], tokenizer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert ids[:257].tolist() == [*range(256), end]
    assert tokenizer.decode(ids[257:-1].tolist()) == "é€😀"
    # transformers' way through the tokenizer, which `load_tokens` takes, gives the same ids.
    assert tokenizer.encode("é\n x").ids == list("é\n x".encode())


def test_a_byte_pair_encoding_has_the_asked_size_and_loses_nothing():
    documents = [("the cat sat on the mat " * 40).encode(), ("a dog on a log " * 40).encode()]
    tokenizer = trained_tokenizer(documents, 270)
    assert tokenizer.get_vocab_size() == 270
    ids = encode(documents, tokenizer)
    assert len(ids) < sum(map(len, documents)) // 2
    assert tokenizer.decode(ids.tolist()).encode() == b"".join(documents)
    with pytest.raises(ValueError, match="has only"):
        trained_tokenizer([b"ab"], 400)


def test_the_same_files_are_held_out_wherever_they_lie(tmp_path):
    for place in ("one", "another/place"):
        for i in range(40):
            file = tmp_path / place / "text" / f"{i}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"document {i} " * (i + 1))
    one, other = (load_text(tmp_path / place / "text") for place in ("one", "another/place"))
    assert one.digest == other.digest
    assert not set(one.train) & set(one.held_out)
    assert 0.05 <= one.n_held_out_bytes / (one.n_held_out_bytes + one.n_train_bytes) < 0.15


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ([""], ValueError, "empty"),
        ("no/such/place", FileNotFoundError, "no file or folder"),
    ],
)
def test_text_that_is_none_is_an_error(source, error, words):
    with pytest.raises(error, match=words):
        load_text(source)


def test_an_epoch_predicts_every_token_once_but_for_its_ends():
    ids = np.arange(1003)
    windows = Windows(ids, context_size=10, separator=-1, seed=3)
    read, predicted = zip(*(windows.batch(i, 9) for i in range(11)), strict=True)
    tokens = torch.cat(predicted).flatten().tolist()
    assert len(set(tokens)) == len(tokens) == 990
    for one, targets in zip(read, predicted, strict=True):
        assert (one[:, 0] == -1).all()
        assert torch.equal(one[:, 1:], targets[:, :-1])
    again = Windows(ids, context_size=10, separator=-1, seed=3).batch(7, 9)
    assert torch.equal(again[1], predicted[7])
    assert not torch.equal(windows.batch(7 + 11, 9)[1], predicted[7])
