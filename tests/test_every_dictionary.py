"""What holds for every kind of dictionary, and for every one that is added later."""

import dataclasses

import pytest
import torch

from saefeat.dictionaries.auxiliary import AuxiliaryConfig
from saefeat.dictionaries.base import Origin, StepContext
from saefeat.dictionaries.batch_topk import BatchTopK
from saefeat.dictionaries.penalty import PenalisedConfig
from saefeat.dictionaries.registry import KINDS, dictionary_type
from saefeat.dictionaries.sae_lens import load_dictionary
from saefeat.kernels import eager
from saefeat.kernels.codes import Codes
from saefeat.training.learner import Scratch

D_IN, D_SAE = 12, 40
SMALL = {
    "standard": {"initial_l0": 10},
    "gated": {"initial_l0": 10},
    "topk": {"k": 5},
    "batch_topk": {"k": 5},
    "jumprelu": {"initial_l0": 10},
    "matryoshka": {"k": 5, "prefix_fractions": (0.1, 0.5, 1.0), "prefix_weights": (1, 2, 3)},
}
SAE_LENS_NAMES = {"batch_topk": "jumprelu", "matryoshka": "jumprelu"}


def build(kind, generator, **changes):
    """An untrained dictionary whose every weight is random, biases included."""
    options = {**SMALL[kind.architecture], **changes}
    origin = Origin(hook_name="blocks.1.hook_resid_post", model_name="tiny", expansion_factor=4)
    dictionary = kind(kind.config_type(**options), D_IN, D_SAE, origin)
    centre = 0.1 * torch.randn(D_IN, generator=generator)
    dictionary.initialise(generator, centre, torch.randn(100, D_IN, generator=generator))
    with torch.no_grad():
        dictionary.encoder.add_(0.2 * torch.randn(D_SAE, D_IN, generator=generator))
        # Every other weight of a kind as well: gates, thresholds.
        for name, parameter in dictionary.named_parameters():
            if name not in ("encoder", "W_dec", "b_dec"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if isinstance(dictionary, BatchTopK):
        dictionary.threshold_sum.fill_(0.6)
        dictionary.threshold_weight.fill_(0.5)
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


def architecture(kind):
    return kind.architecture


def kinds_configured_by(config_type):
    return [kind for kind in KINDS if issubclass(kind.config_type, config_type)]


@pytest.fixture(params=KINDS, ids=architecture)
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
    fresh.initialise(generator, torch.full((D_IN,), 0.5), torch.randn(9, D_IN))
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(fresh.W_enc, fresh.W_dec.T)
    assert torch.equal(fresh.b_dec, torch.full((D_IN,), 0.5))


@pytest.mark.parametrize("kind", kinds_configured_by(PenalisedConfig), ids=architecture)
def test_penalised_kinds_start_at_the_sparsity_asked_for(kind, generator, x):
    fresh = kind(kind.config_type(initial_l0=6), D_IN, D_SAE)
    fresh.initialise(generator, torch.zeros(D_IN), x)
    assert float(fresh.encode(x).row_counts().float().mean()) == pytest.approx(6, abs=0.1)


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
    architecture = SAE_LENS_NAMES.get(dictionary.architecture, dictionary.architecture)
    assert theirs.cfg.architecture() == architecture
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "tiny"


def test_folding_a_scale_keeps_latents_and_scales_outputs(dictionary, x):
    scale = 7.5
    scaled_codes, scaled_output = dictionary.encode(scale * x), dictionary(scale * x)
    dictionary.fold_scale(scale)
    torch.testing.assert_close(dictionary.encode(x).to_dense() * scale, scaled_codes.to_dense())
    torch.testing.assert_close(dictionary(x) * scale, scaled_output)


def test_training_codes_equal_inference_codes(dictionary, x):
    if isinstance(dictionary, BatchTopK):  # the batch decides the threshold of inference
        dictionary.threshold_sum.zero_()
        dictionary.threshold_weight.zero_()
    training = dictionary.training_loss(x, context_for(x)).codes.to_dense()
    inference = dictionary.encode(x).to_dense()
    differ = (training - inference).abs() > 1e-5
    # Above the threshold is not at it, which the least value that a batch keeps is.
    assert int(differ.sum()) == (1 if isinstance(dictionary, BatchTopK) else 0)


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


def share(error, x):
    return error.square().sum() / (x - x.mean(0)).square().sum()


def plain_scores(dictionary, x):
    return (x - dictionary.b_dec) @ dictionary.encoder.T + dictionary.b_enc


def plain_auxiliary(dictionary, x, error, dead):
    """AuxK of Gao et al. 2024 written out densely, on the first quarter of the rows."""
    if not isinstance(dictionary.config, AuxiliaryConfig):
        return 0.0
    rows = len(x) // 4
    error = error[:rows].detach()
    scores = (x[:rows] - dictionary.b_dec.detach()) @ dictionary.encoder.T + dictionary.b_enc
    scores = scores.masked_fill(~dead, -torch.inf)
    k = min(dictionary.config.auxiliary_k or dictionary.d_in // 2, int(dead.sum()))
    latents = scores.topk(k, dim=1).indices
    values = scores.gather(1, latents).relu()
    guess = torch.zeros_like(scores).scatter(1, latents, values) @ dictionary.W_dec
    spread = (error - error.mean(0)).square().sum()
    return dictionary.config.auxiliary_weight * (error - guess).square().sum() / spread


def plain_loss(dictionary, x, dead, values, extra=0.0):
    error = x - values @ dictionary.W_dec - dictionary.b_dec
    return share(error, x) + extra + plain_auxiliary(dictionary, x, error, dead)


def plain_topk(dictionary, x, dead):
    scores = plain_scores(dictionary, x)
    kept = torch.zeros_like(scores).scatter(1, scores.topk(5, dim=1).indices, 1.0)
    return plain_loss(dictionary, x, dead, (scores * kept).relu())


def kept_over_the_batch(scores):
    return scores * (scores >= scores.flatten().topk(5 * len(scores)).values[-1])


def plain_batch_topk(dictionary, x, dead):
    scores = plain_scores(dictionary, x)
    return plain_loss(dictionary, x, dead, kept_over_the_batch(scores).relu())


def plain_matryoshka(dictionary, x, dead):
    values = kept_over_the_batch(plain_scores(dictionary, x)).relu()
    losses = []
    for prefix in (4, 20, 40):
        recon = values[:, :prefix] @ dictionary.W_dec[:prefix] + dictionary.b_dec
        losses.append(share(x - recon, x))
    error = x - recon
    mixed = (losses[0] + 2 * losses[1] + 3 * losses[2]) / 6
    return mixed + plain_auxiliary(dictionary, x, error, dead)


def plain_standard(dictionary, x, dead):
    values = plain_scores(dictionary, x).relu()
    l1 = 2.0 * (values * dictionary.W_dec.norm(dim=1)).sum()
    return plain_loss(dictionary, x, dead, values, l1 / (x - x.mean(0)).square().sum())


def plain_gated(dictionary, x, dead):
    centred = x - dictionary.b_dec
    gates = centred @ dictionary.encoder.T + dictionary.b_enc
    magnitudes = centred @ (dictionary.encoder.T * dictionary.r_mag.exp()) + dictionary.b_mag
    values = magnitudes.relu() * (gates > 0)
    l1 = 2.0 * (gates.relu() * dictionary.W_dec.norm(dim=1)).sum()
    frozen = x - gates.relu() @ dictionary.W_dec.detach() - dictionary.b_dec.detach()
    extra = l1 / (x - x.mean(0)).square().sum() + share(frozen, x)
    return plain_loss(dictionary, x, dead, values, extra)


class PlainStep(torch.autograd.Function):
    """Heaviside of `scores - threshold`, with equation 12 of arXiv:2407.14435 as its gradient."""

    @staticmethod
    def forward(ctx, scores, threshold):
        ctx.save_for_backward(scores, threshold)
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient):
        scores, threshold = ctx.saved_tensors
        window = ((scores - threshold).abs() < 0.5).to(scores.dtype)
        return torch.zeros_like(scores), -(gradient * window).sum(0)


def plain_jumprelu(dictionary, x, dead):
    """As f = scores * step, the jump's gradient (equation 11) differs by scores for threshold."""
    scores, threshold = plain_scores(dictionary, x), dictionary.log_threshold.exp()
    step = PlainStep.apply(scores.detach(), threshold)
    values = scores * (scores > threshold) + threshold.detach() * (step - step.detach())
    penalty = 2.0 * PlainStep.apply(scores, threshold).sum()
    extra = penalty / (x - x.mean(0)).square().sum()
    return plain_loss(dictionary, x, dead, values, extra)


PLAIN_LOSS = {
    "standard": plain_standard,
    "gated": plain_gated,
    "topk": plain_topk,
    "batch_topk": plain_batch_topk,
    "jumprelu": plain_jumprelu,
    "matryoshka": plain_matryoshka,
}


@pytest.mark.parametrize("kind", kinds_configured_by(AuxiliaryConfig), ids=architecture)
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


def test_a_restarted_latent_stands_for_its_new_direction_alone(dictionary, x):
    latents = torch.tensor([2, 7])
    directions = torch.nn.functional.normalize(x[:2], dim=1)
    before = {name: p.clone() for name, p in dictionary.named_parameters()}
    dictionary.restart(latents, directions)
    assert torch.equal(dictionary.W_dec[latents], directions)
    others = [i for i in range(D_SAE) if i not in (2, 7)]
    mean_length = before["encoder"][others].norm(dim=1).mean()
    torch.testing.assert_close(
        dictionary.encoder[latents].norm(dim=1), (0.2 * mean_length).expand(2)
    )
    for name, parameter in dictionary.named_parameters():
        if parameter.shape[0] == D_SAE:
            assert torch.equal(parameter[others], before[name][others]), name


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
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        dictionary.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_config_belongs_to_one_kind(kind):
    config = kind.config_type(**SMALL[kind.architecture])
    assert dictionary_type(config) is kind
    assert dataclasses.is_dataclass(config)
