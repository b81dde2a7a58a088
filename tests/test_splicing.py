"""Dictionaries in the place of activations, on every TransformerLens class that predicts tokens."""

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, WIDTH, tiny_model, token_ids
from torch import Tensor

import saefeat as sf
from saefeat.dictionaries.base import Dictionary, Origin
from saefeat.dictionaries.crosscoder import Crosscoder
from saefeat.dictionaries.registry import KINDS
from saefeat.dictionaries.topk import TopK
from saefeat.metrics.loss_recovered import CrossEntropy

HOOK, LATER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
D_SAE = 3 * WIDTH
OF_ONE_HOOK = [kind for kind in KINDS if not kind.reads_several_hooks]


@pytest.fixture(params=["bridge of Llama", "bridge of GPT-2", "HookedTransformer"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny_model("bridge of Llama")


@pytest.fixture
def sae(llama: Any) -> Dictionary:
    return trained(llama, HOOK)


def trained(model: Any, hook_name: str, kind: Any = TopK, **options: Any) -> Dictionary:
    """A dictionary of real activations, after a few steps."""
    read_hooks = [hook_name, *options.get("targets", {}).values()]
    rows = sf.read_activations(model, token_ids(32, 8), read_hooks)
    stream = sf.ActivationStream.from_tensors(rows, batch_size=64)
    settings = {"k": 4} if hasattr(kind.config_type(), "k") else {"initial_l0": 8}
    bank = sf.train(
        stream,
        kind.config_type(**settings),
        expansion_factors=[3],
        n_tokens=640,
        **options,
    )
    return bank[hook_name, 3, 0]


def read(model: Any, hook_name: str = HOOK) -> Tensor:
    return sf.read_activations(model, token_ids(), hook_name)[hook_name]


def hooks_of(model: Any) -> dict[str, list[Any]]:
    return {
        name: [*module._forward_hooks.values(), *getattr(module, "fwd_hooks", [])]
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("kind", OF_ONE_HOOK, ids=lambda kind: kind.architecture)
def test_with_the_error_kept_a_splice_without_an_effect_is_the_identity(kind: Any) -> None:
    model, ids = tiny_model("bridge of Llama"), token_ids()
    dictionary, logits = trained(model, HOOK, kind), model(ids)
    for edit in (None, lambda codes: codes, {}):
        with dictionary.spliced(model, edit=edit, keep_error=True):
            assert torch.equal(model(ids), logits)
    with dictionary.spliced(model):
        assert not torch.equal(model(ids), logits)


def test_the_rows_become_the_reconstruction_and_the_hooks_go_afterwards(model: Any) -> None:
    sae, ids = trained(model, HOOK), token_ids()
    rows, logits, before = read(model), model(ids), hooks_of(model)
    with sae.spliced(model, max_norm_ratio=None):
        torch.testing.assert_close(read(model), sae(rows))
        assert not torch.equal(model(ids), logits)
    assert hooks_of(model) == before
    assert torch.equal(model(ids), logits)


def test_the_loss_is_that_which_loss_recovered_measures(llama: Any, sae: Dictionary) -> None:
    counts = torch.ones(4, 8, dtype=torch.bool)
    counts[:, 0] = False
    tokens = sf.Tokens(ids=token_ids(4, 8), counts=counts)
    evaluation = CrossEntropy(llama, tokens)
    with sae.spliced(llama, positions=tokens.counts):
        loss = evaluation.clean()
    assert loss == evaluation.replaced(HOOK, sae)
    assert loss != evaluation.clean()
    with sae.spliced(llama):
        assert evaluation.clean() != loss


def test_a_transcoder_replaces_its_target(llama: Any) -> None:
    transcoder = trained(llama, HOOK, targets={HOOK: LATER})
    rows, target = read(llama), read(llama, LATER)
    with transcoder.spliced(llama, max_norm_ratio=None):
        assert torch.equal(read(llama), rows)
        torch.testing.assert_close(read(llama, LATER), transcoder(rows))
    with transcoder.spliced(llama, keep_error=True):
        assert torch.equal(read(llama, LATER), target)


def test_ablating_a_latent_takes_away_its_contribution_and_nothing_else(
    llama: Any, sae: Dictionary
) -> None:
    rows = read(llama)
    codes = sae.encode(rows).to_dense()
    latent = int(codes.sum(0).argmax())
    contribution = codes[:, latent, None] * sae.W_dec[latent]
    assert contribution.norm() > 0.1
    for keep_error, whole in ((True, rows), (False, sae(rows))):
        with sae.spliced(llama, edit={latent: 0.0}, keep_error=keep_error, max_norm_ratio=None):
            torch.testing.assert_close(read(llama), whole - contribution)


def test_steering_adds_the_latents_direction_also_where_it_was_off(
    llama: Any, sae: Dictionary
) -> None:
    rows = read(llama)
    off = int((sae.encode(rows).firing_counts() == 0).nonzero()[0])
    with sae.spliced(llama, edit={off: 2.5}, keep_error=True):
        torch.testing.assert_close(read(llama), rows + 2.5 * sae.W_dec[off])


def test_an_edit_is_given_dense_codes_and_may_change_them_in_place(
    llama: Any, sae: Dictionary
) -> None:
    rows, given = read(llama), []

    def double(codes: Tensor) -> Tensor:
        given.append(codes.clone())
        return codes.mul_(2)

    with sae.spliced(llama, edit=double, keep_error=True):
        torch.testing.assert_close(read(llama), rows + sae(rows) - sae.b_dec)
    assert torch.equal(given[0], sae.encode(rows).to_dense())


def test_gradients_reach_the_codes(llama: Any, sae: Dictionary) -> None:
    kept: list[Tensor] = []

    def keep(codes: Tensor) -> Tensor:
        codes.retain_grad()
        kept.append(codes)
        return codes

    with sae.spliced(llama, edit=keep, positions=torch.ones(3, 8, dtype=torch.bool)):
        llama(token_ids())[..., 7].sum().backward()
    gradient = kept[0].grad
    assert gradient is not None
    assert (gradient[kept[0] == 0] != 0).any(), "a latent that is off could be on"
    # That of a matrix product by the decoder: it has no more dimensions than the decoder.
    rows_gradient = torch.linalg.lstsq(sae.W_dec.detach(), gradient.T).solution
    torch.testing.assert_close(sae.W_dec.detach() @ rows_gradient, gradient.T)


@pytest.mark.parametrize("keep_error", [True, False])
def test_a_steering_coefficient_can_be_learned_from_0_on(
    llama: Any, sae: Dictionary, keep_error: bool
) -> None:
    off = int((sae.encode(read(llama)).firing_counts() == 0).nonzero()[0])

    def loss(coefficient: Tensor) -> Tensor:
        def steer(codes: Tensor) -> Tensor:
            return codes + coefficient * torch.nn.functional.one_hot(torch.tensor(off), D_SAE)

        with sae.spliced(llama, edit=steer, keep_error=keep_error):
            result: Tensor = llama(token_ids())[..., 7].double().sum()
            return result

    coefficient = torch.zeros((), requires_grad=True)
    loss(coefficient).backward()
    with torch.no_grad():
        slope = (loss(torch.tensor(0.01)) - loss(torch.tensor(-0.01))) / 0.02
    assert coefficient.grad is not None
    assert abs(float(slope)) > 0.01
    assert float(coefficient.grad) == pytest.approx(float(slope), rel=0.01)


def test_two_dictionaries_at_different_hooks_can_be_nested(llama: Any, sae: Dictionary) -> None:
    later = trained(llama, LATER)
    with sae.spliced(llama, max_norm_ratio=None):
        expected = later(read(llama, LATER))
        with later.spliced(llama, max_norm_ratio=None):
            torch.testing.assert_close(read(llama, LATER), expected)
        assert not torch.equal(read(llama, LATER), expected)


def test_positions_that_are_left_out_keep_their_activations(llama: Any, sae: Dictionary) -> None:
    rows, positions = read(llama), torch.ones(3, 8, dtype=torch.bool)
    positions[:, 0] = False
    with sae.spliced(llama, edit={5: 9.0}, positions=positions):
        changed = (read(llama) != rows).any(dim=1)
        with pytest.raises(ValueError, match=r"positions has shape \[3, 8\], .* \[3, 5\]"):
            llama(token_ids(3, 5))
    assert torch.equal(changed, positions.flatten())


def test_attention_sinks_keep_their_activations_unless_asked_otherwise(sae: Dictionary) -> None:
    model, hook, ids = tiny_model("bridge of Llama"), "blocks.0.hook_resid_pre", token_ids()
    sink = ids[1, 3]
    with torch.no_grad():
        model.original_model.model.embed_tokens.weight[sink] *= 100
    rows = read(model, hook)
    sae.with_origin(hook_name=hook)
    for ratio, spared in ((10.0, (ids == sink).flatten()), (None, torch.zeros(24).bool())):
        with sae.spliced(model, edit={0: 9.0}, max_norm_ratio=ratio):
            assert torch.equal((read(model, hook) == rows).all(dim=1), spared)


def test_a_model_in_bfloat16_keeps_its_dtype_and_its_logits(sae: Dictionary) -> None:
    model, ids = tiny_model("bridge of Llama").to(torch.bfloat16), token_ids()
    logits = model(ids)
    with sae.spliced(model, edit=lambda codes: codes, keep_error=True):
        assert torch.equal(model(ids), logits)
    with sae.spliced(model):
        assert model(ids).shape == (3, 8, VOCABULARY)
        assert read(model).dtype == torch.bfloat16


def test_hooks_are_gone_after_an_error_in_the_block_and_in_the_edit(
    llama: Any, sae: Dictionary
) -> None:
    before = hooks_of(llama)
    with pytest.raises(ZeroDivisionError), sae.spliced(llama):
        raise ZeroDivisionError
    with (
        pytest.raises(ValueError, match=r"returned codes of shape \[24, 3\]"),
        sae.spliced(llama, edit=lambda codes: codes[:, :3]),
    ):
        llama(token_ids())
    assert hooks_of(llama) == before


def test_what_does_not_fit_is_one_clear_error(llama: Any, sae: Dictionary) -> None:
    before = hooks_of(llama)
    with pytest.raises(ValueError, match=rf"latent {D_SAE}, and the dictionary has 0 to"):
        sae.spliced(llama, edit={D_SAE: 1.0})
    narrow = TopK(sf.TopKConfig(k=4), 16, 64, Origin(hook_name=HOOK, model_name="other"))
    with (
        pytest.raises(ValueError, match=r"holds 32 numbers .* reads 16 .* trained on other"),
        narrow.spliced(llama),
    ):
        llama(token_ids())
    with (
        pytest.raises(ValueError, match=r"No hook of the model matches .* Near matches"),
        sae.with_origin(hook_name="blocks.9.hook_resid_post").spliced(llama),
    ):
        pass
    with pytest.raises(ValueError, match="does not say which hook"):
        sae.with_origin(hook_name="").spliced(llama)
    widths = {HOOK: WIDTH, LATER: WIDTH}
    crosscoder = Crosscoder(
        sf.CrosscoderConfig(k=4), 2 * WIDTH, D_SAE, Origin(hook_name="both", hook_widths=widths)
    )
    with pytest.raises(ValueError, match="crosscoder cannot be spliced in"):
        crosscoder.spliced(llama)
    assert hooks_of(llama) == before
