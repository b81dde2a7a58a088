"""What holds for every kind of dictionary, and for every one that is added later."""

import dataclasses

import pytest
import torch

from saefeat.dictionaries.base import Origin, StepContext
from saefeat.dictionaries.registry import KINDS, dictionary_type
from saefeat.dictionaries.sae_lens import load_dictionary
from saefeat.kernels import eager
from saefeat.kernels.codes import Codes
from saefeat.training.learner import Scratch

D_IN, D_SAE = 12, 40
SMALL = {"topk": {"k": 5}}


def build(kind, generator, **changes):
    """An untrained dictionary whose every weight is random, biases included."""
    options = {**SMALL[kind.architecture], **changes}
    origin = Origin(hook_name="blocks.1.hook_resid_post", model_name="tiny", expansion_factor=4)
    dictionary = kind(kind.config_type(**options), D_IN, D_SAE, origin)
    dictionary.initialise(generator, 0.1 * torch.randn(D_IN, generator=generator))
    with torch.no_grad():
        dictionary.encoder.add_(0.2 * torch.randn(D_SAE, D_IN, generator=generator))
        dictionary.b_enc.add_(0.1 * torch.randn(D_SAE, generator=generator))
    return dictionary


def context_for(x, dead=None):
    dead = torch.zeros(D_SAE, dtype=torch.bool) if dead is None else dead
    return StepContext(
        kernels=eager,
        selection_dtype=x.dtype,
        scratch=Scratch(x.device),
        progress=0.5,
        variance=(x - x.mean(0)).square().sum(),
        dead=dead,
        n_dead=int(dead.sum()),
    )


@pytest.fixture(params=KINDS, ids=lambda kind: kind.architecture)
def kind(request):
    return request.param


@pytest.fixture
def dictionary(kind, generator):
    return build(kind, generator)


@pytest.fixture
def x(generator):
    return torch.randn(50, D_IN, generator=generator)


def test_initial_decoder_rows_are_unit_and_tied_to_the_encoder(kind, generator):
    fresh = kind(kind.config_type(**SMALL[kind.architecture]), D_IN, D_SAE)
    fresh.initialise(generator, torch.full((D_IN,), 0.5))
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(fresh.W_enc, fresh.W_dec.T)
    assert torch.equal(fresh.b_dec, torch.full((D_IN,), 0.5))


def test_decode_equals_the_dense_product(dictionary, x):
    codes = dictionary.encode(x)
    dense = codes.to_dense() @ dictionary.W_dec + dictionary.b_dec
    torch.testing.assert_close(dictionary(x), dense)


def test_a_saved_dictionary_loads_with_equal_weights_and_origin(dictionary, x, tmp_path):
    folder = dictionary.save(tmp_path / "sae")
    loaded = load_dictionary(folder)
    assert type(loaded) is type(dictionary)
    assert loaded.config == dictionary.config
    assert loaded.origin == dictionary.origin
    assert torch.equal(loaded(x), dictionary(x))


def test_sae_lens_opens_a_saved_dictionary_with_equal_outputs(dictionary, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    folder = dictionary.save(tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.encode(x), dictionary.encode(x).to_dense(), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(theirs(x), dictionary(x), atol=1e-5, rtol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "tiny"


def test_folding_a_scale_keeps_latents_and_scales_outputs(dictionary, x):
    scale = 7.5
    scaled_codes, scaled_output = dictionary.encode(scale * x), dictionary(scale * x)
    dictionary.fold_scale(scale)
    torch.testing.assert_close(dictionary.encode(x).to_dense() * scale, scaled_codes.to_dense())
    torch.testing.assert_close(dictionary(x) * scale, scaled_output)


def test_training_codes_equal_inference_codes(dictionary, x):
    loss = dictionary.training_loss(x, context_for(x))
    torch.testing.assert_close(loss.codes.to_dense(), dictionary.encode(x).to_dense())


def test_gradients_equal_autograd_of_the_plain_formula(kind, generator, x):
    dictionary = build(kind, generator).double()
    x = x.double()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::3] = True
    dictionary.training_loss(x, context_for(x, dead)).total.backward()
    gradients = {name: p.grad.clone() for name, p in dictionary.named_parameters()}
    dictionary.zero_grad()
    PLAIN_LOSS[kind.architecture](dictionary, x, dead).backward()
    for name, parameter in dictionary.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


def plain_top_k_loss(dictionary, x, dead):
    """Gao et al. 2024 written out densely: FVU plus AuxK on the first quarter of the rows."""
    config = dictionary.config
    pre = (x - dictionary.b_dec) @ dictionary.encoder.T + dictionary.b_enc
    kept = torch.zeros_like(pre).scatter(1, pre.topk(config.k, dim=1).indices, 1.0)
    recon = (pre * kept).relu() @ dictionary.W_dec + dictionary.b_dec
    main = (x - recon).square().sum() / (x - x.mean(0)).square().sum()
    rows = len(x) // 4
    error = (x - recon)[:rows].detach()
    pre = (x[:rows] - dictionary.b_dec.detach()) @ dictionary.encoder.T + dictionary.b_enc
    pre = pre.masked_fill(~dead, -torch.inf)
    k = min(config.auxiliary_k or dictionary.d_in // 2, int(dead.sum()))
    latents = pre.topk(k, dim=1).indices
    values = pre.gather(1, latents).relu()
    guess = torch.zeros_like(pre).scatter(1, latents, values) @ dictionary.W_dec
    variance = (error - error.mean(0)).square().sum()
    return main + config.auxiliary_weight * (error - guess).square().sum() / variance


PLAIN_LOSS = {"topk": plain_top_k_loss}


def test_the_auxiliary_loss_alone_reaches_the_weights_of_dead_latents(kind, generator, x):
    dictionary = build(kind, generator)
    x = x[:3].repeat(8, 1)  # few different rows, so that some latents are never on
    off = dictionary.encode(x).firing_counts() == 0
    with_aux = dictionary.training_loss(x, context_for(x, off)).total
    with_aux.backward()
    assert dictionary.encoder.grad[off].abs().sum() > 0
    assert dictionary.W_dec.grad[off].abs().sum() > 0
    dictionary.zero_grad()
    dictionary.training_loss(x, context_for(x)).total.backward()
    assert dictionary.encoder.grad[off].abs().sum() == 0


def test_activations_of_another_width_are_an_error(dictionary):
    with pytest.raises(ValueError, match=r"reads \[n, 12\]"):
        dictionary.encode(torch.zeros(3, D_IN + 1))
    with pytest.raises(ValueError, match="Flatten batch and position"):
        dictionary.encode(torch.zeros(2, 3, D_IN))


def test_codes_of_another_width_are_an_error(dictionary):
    with pytest.raises(ValueError, match="7 latents"):
        dictionary.decode(Codes.from_dense(torch.ones(2, 7)))


def test_a_folder_that_holds_a_dictionary_is_never_overwritten(dictionary, tmp_path):
    dictionary.save(tmp_path / "sae")
    before = (tmp_path / "sae" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        dictionary.save(tmp_path / "sae")
    assert (tmp_path / "sae" / "sae_weights.safetensors").read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(dictionary, tmp_path):
    with torch.no_grad():
        dictionary.b_enc[0] = torch.nan
    with pytest.raises(ValueError, match="b_enc"):
        dictionary.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_config_belongs_to_one_kind(kind):
    config = kind.config_type(**SMALL[kind.architecture])
    assert dictionary_type(config) is kind
    assert dataclasses.is_dataclass(config)
