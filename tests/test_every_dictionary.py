"""What holds for every kind of dictionary, and for every one that is added later."""

import dataclasses

import pytest
import torch

from saefeat.dictionaries.auxiliary import AuxiliaryConfig
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.batch_topk import BatchTopK
from saefeat.dictionaries.crosscoder import Crosscoder
from saefeat.dictionaries.gated import Gated
from saefeat.dictionaries.jump_relu import JumpReLU
from saefeat.dictionaries.loading import load_dictionary
from saefeat.dictionaries.matching_pursuit import MatchingPursuit
from saefeat.dictionaries.matryoshka import Matryoshka
from saefeat.dictionaries.penalty import PenalisedConfig
from saefeat.dictionaries.registry import KINDS, dictionary_type
from saefeat.dictionaries.sparse_autoencoder import SparseAutoencoder
from saefeat.dictionaries.standard import Standard
from saefeat.dictionaries.step import StepContext
from saefeat.dictionaries.topk import TopK
from saefeat.kernels import eager
from saefeat.kernels.codes import Codes

D_IN, D_OUT, D_SAE = 12, 9, 40
SMALL = {
    "standard": {"initial_l0": 10},
    "gated": {"initial_l0": 10},
    "topk": {"k": 5},
    "batch_topk": {"k": 5},
    "jumprelu": {"initial_l0": 10},
    "matching_pursuit_refit": {"k": 5},
    "crosscoder": {"k": 5},
    "l1_crosscoder": {"initial_l0": 10},
    "matryoshka": {"k": 5, "prefix_fractions": (0.1, 0.5, 1.0), "prefix_weights": (1, 2, 3)},
}
SAE_LENS_NAMES = {"batch_topk": "jumprelu", "matryoshka": "jumprelu"}
HOOK_WIDTHS = {"blocks.1.hook_resid_post": 5, "blocks.2.hook_resid_post": 7}
ENCODED = [kind for kind in KINDS if issubclass(kind, SparseAutoencoder)]
OF_ONE_HOOK = [kind for kind in ENCODED if not kind.reads_several_hooks]


def build(kind, generator, d_out=None):
    """An untrained dictionary whose every weight is random, biases included."""
    origin = Origin(hook_name="blocks.1.hook_resid_post", model_name="tiny", expansion_factor=4)
    if kind.reads_several_hooks:
        origin = dataclasses.replace(origin, hook_name="1+2", hook_widths=HOOK_WIDTHS)
    config = kind.config_type(**SMALL[kind.architecture])
    dictionary = kind(config, D_IN, D_SAE, origin, d_out)
    centre = 0.1 * torch.randn(dictionary.d_out, generator=generator)
    sample = torch.randn(100, D_IN, generator=generator)
    target = sample if d_out is None else sample[:, :d_out].square()
    dictionary.initialise(generator, centre, sample, target)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            if name not in ("W_dec", "b_dec"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if isinstance(dictionary, BatchTopK):
        dictionary.threshold_sum.fill_(0.6)
        dictionary.threshold_weight.fill_(0.5)
    return dictionary


def context_for(target, dead=None):
    none = torch.zeros(0, dtype=torch.int64)
    return StepContext(
        kernels=eager,
        progress=0.5,
        variance=(target - target.mean(0)).square().sum(),
        dead=none if dead is None else dead.nonzero().squeeze(1),
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


def test_initial_decoder_rows_are_unit_and_an_encoder_is_tied_to_them(kind, generator, x):
    fresh = kind(kind.config_type(**SMALL[kind.architecture]), D_IN, D_SAE)
    fresh.initialise(generator, torch.full((D_IN,), 0.5), x, x)
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(fresh.b_dec, torch.full((D_IN,), 0.5))
    if kind in ENCODED:
        assert torch.equal(fresh.W_enc, fresh.W_dec.T)


@pytest.mark.parametrize("kind", OF_ONE_HOOK, ids=architecture)
def test_a_transcoder_starts_from_what_the_target_does_where_a_latent_is_high(kind, generator, x):
    fresh = kind(kind.config_type(**SMALL[kind.architecture]), D_IN, D_SAE, d_out=D_OUT)
    target = x @ torch.randn(D_IN, D_OUT, generator=generator)
    fresh.initialise(generator, torch.zeros(D_OUT), x, target)
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(D_SAE))
    high = torch.relu((x - x.mean(0)) @ fresh.W_enc)
    follows = torch.nn.functional.cosine_similarity(
        high.T @ (target - target.mean(0)), fresh.W_dec, dim=1
    )
    torch.testing.assert_close(follows, torch.ones(D_SAE))


@pytest.mark.parametrize("kind", kinds_configured_by(PenalisedConfig), ids=architecture)
def test_penalised_kinds_start_at_the_sparsity_asked_for(kind, generator, x):
    fresh = kind(kind.config_type(initial_l0=6), D_IN, D_SAE)
    fresh.initialise(generator, torch.zeros(D_IN), x, x)
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


@pytest.mark.parametrize("kind", OF_ONE_HOOK, ids=architecture)
def test_sae_lens_opens_a_saved_dictionary_with_equal_outputs(kind, generator, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    dictionary = build(kind, generator)
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


def test_sae_lens_refuses_what_it_would_misread(generator, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    folder = build(MatchingPursuit, generator).save(tmp_path / "pursuit")
    with pytest.raises((KeyError, ValueError), match="matching_pursuit_refit"):
        sae_lens.SAE.load_from_disk(str(folder))
    folder = build(Crosscoder, generator).save(tmp_path / "crosscoder")
    with pytest.raises((KeyError, ValueError), match="crosscoder"):
        sae_lens.SAE.load_from_disk(str(folder))
    folder = build(TopK, generator, d_out=D_OUT).save(tmp_path / "transcoder")
    with pytest.raises((KeyError, ValueError), match="topk_transcoder"):
        sae_lens.SAE.load_from_disk(str(folder))


@pytest.mark.parametrize("kind", [Standard, BatchTopK, JumpReLU, Matryoshka], ids=architecture)
def test_sae_lens_opens_a_saved_transcoder_with_equal_outputs(kind, generator, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    dictionary = build(kind, generator, d_out=D_OUT)
    theirs = sae_lens.SAE.load_from_disk(str(dictionary.save(tmp_path / "transcoder")))
    assert theirs.cfg.d_out == D_OUT
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), dictionary(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", OF_ONE_HOOK, ids=architecture)
def test_a_saved_transcoder_loads_with_equal_outputs(kind, generator, x, tmp_path):
    dictionary = build(kind, generator, d_out=D_OUT)
    loaded = load_dictionary(dictionary.save(tmp_path / "transcoder"))
    assert loaded.is_transcoder
    assert torch.equal(loaded(x), dictionary(x))


@pytest.mark.parametrize("kind", OF_ONE_HOOK, ids=architecture)
def test_folding_the_scales_of_a_transcoder_keeps_latents_and_scales_outputs(kind, generator, x):
    dictionary = build(kind, generator, d_out=D_OUT)
    scaled_codes, scaled_output = dictionary.encode(7.5 * x), dictionary(7.5 * x)
    dictionary.fold_scale(7.5, 0.3)
    torch.testing.assert_close(dictionary.encode(x).to_dense() * 0.3, scaled_codes.to_dense())
    torch.testing.assert_close(dictionary(x) * 0.3, scaled_output)


def test_folding_a_scale_keeps_latents_and_scales_outputs(dictionary, x):
    scale = 7.5
    scaled_codes, scaled_output = dictionary.encode(scale * x), dictionary(scale * x)
    dictionary.fold_scale(scale, scale)
    torch.testing.assert_close(dictionary.encode(x).to_dense() * scale, scaled_codes.to_dense())
    torch.testing.assert_close(dictionary(x) * scale, scaled_output)


def test_training_codes_equal_inference_codes(dictionary, x):
    if isinstance(dictionary, BatchTopK):  # the batch decides the threshold of inference
        dictionary.threshold_sum.zero_()
        dictionary.threshold_weight.zero_()
    training = dictionary.training_loss(x, x, context_for(x)).codes.to_dense()
    inference = dictionary.encode(x).to_dense()
    differ = (training - inference).abs() > 1e-5
    # Above the threshold is not at it, which the least value that a batch keeps is.
    assert int(differ.sum()) == (1 if isinstance(dictionary, BatchTopK) else 0)


def test_gradients_equal_autograd_of_the_plain_formula(dictionary, x):
    check_gradients(dictionary.double(), x.double(), x.double())


@pytest.mark.parametrize("kind", OF_ONE_HOOK, ids=architecture)
def test_gradients_of_a_transcoder_equal_autograd_of_the_plain_formula(kind, generator, x):
    target = torch.randn(len(x), D_OUT, generator=generator, dtype=torch.float64)
    check_gradients(build(kind, generator, d_out=D_OUT).double(), x.double(), target)


def check_gradients(dictionary, x, target):
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::3] = True
    dictionary.training_loss(x, target, context_for(target, dead)).total.backward()
    gradients = {name: p.grad.clone() for name, p in dictionary.named_parameters()}
    dictionary.zero_grad()
    PLAIN_LOSS[dictionary.architecture](dictionary, x, target, dead).backward()
    for name, parameter in dictionary.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


def share(error, target):
    return error.square().sum() / (target - target.mean(0)).square().sum()


def plain_centred(dictionary, x):
    return x if dictionary.is_transcoder else x - dictionary.b_dec


def plain_scores(dictionary, x):
    return plain_centred(dictionary, x) @ dictionary.encoder.T + dictionary.b_enc


def plain_auxiliary(dictionary, x, error, dead):
    """AuxK of Gao et al. 2024 written out densely, on the first quarter of the rows."""
    if not isinstance(dictionary.config, AuxiliaryConfig):
        return 0.0
    rows = len(x) // 4
    error = error[:rows].detach()
    centred = plain_centred(dictionary, x[:rows]).detach()
    scores = centred @ dictionary.encoder.T + dictionary.b_enc
    scores = scores.masked_fill(~dead, -torch.inf)
    k = min(dictionary.config.auxiliary_k or int(dictionary.mean_width) // 2, int(dead.sum()))
    latents = scores.topk(k, dim=1).indices
    values = scores.gather(1, latents).relu()
    guess = torch.zeros_like(scores).scatter(1, latents, values) @ dictionary.W_dec
    spread = (error - error.mean(0)).square().sum()
    return dictionary.config.auxiliary_weight * (error - guess).square().sum() / spread


def plain_loss(dictionary, x, target, dead, values, extra=0.0):
    error = target - values @ dictionary.W_dec - dictionary.b_dec
    return share(error, target) + extra + plain_auxiliary(dictionary, x, error, dead)


def plain_topk(dictionary, x, target, dead):
    scores = plain_scores(dictionary, x)
    kept = torch.zeros_like(scores).scatter(1, scores.topk(5, dim=1).indices, 1.0)
    return plain_loss(dictionary, x, target, dead, (scores * kept).relu())


def kept_over_the_batch(scores, weights=1.0):
    ranks = scores * weights
    return scores * (ranks >= ranks.flatten().topk(5 * len(scores)).values[-1])


def plain_batch_topk(dictionary, x, target, dead):
    scores = plain_scores(dictionary, x)
    return plain_loss(dictionary, x, target, dead, kept_over_the_batch(scores).relu())


def plain_matryoshka(dictionary, x, target, dead):
    values = kept_over_the_batch(plain_scores(dictionary, x)).relu()
    losses = []
    for prefix in (4, 20, 40):
        recon = values[:, :prefix] @ dictionary.W_dec[:prefix] + dictionary.b_dec
        losses.append(share(target - recon, target))
    error = target - recon
    mixed = (losses[0] + 2 * losses[1] + 3 * losses[2]) / 6
    return mixed + plain_auxiliary(dictionary, x, error, dead)


def plain_decoder_norms(dictionary):
    """Summed over the hooks of a crosscoder."""
    if not dictionary.reads_several_hooks:
        return dictionary.W_dec.norm(dim=1)
    return dictionary.W_dec[:, :5].norm(dim=1) + dictionary.W_dec[:, 5:].norm(dim=1)


def plain_crosscoder(dictionary, x, target, dead):
    values = kept_over_the_batch(plain_scores(dictionary, x), plain_decoder_norms(dictionary))
    return plain_loss(dictionary, x, target, dead, values.relu())


def l1_share(l1, target):
    return l1 / ((target - target.mean(0)).square().sum() * target.numel()).sqrt()


def plain_standard(dictionary, x, target, dead):
    values = plain_scores(dictionary, x).relu()
    l1 = 2.0 * (values * plain_decoder_norms(dictionary)).sum()
    return plain_loss(
        dictionary,
        x,
        target,
        dead,
        values,
        l1_share(l1, target),
    )


def plain_gated(dictionary, x, target, dead):
    centred = plain_centred(dictionary, x)
    gates = centred @ dictionary.encoder.T + dictionary.b_enc
    magnitudes = centred @ (dictionary.encoder.T * dictionary.r_mag.exp()) + dictionary.b_mag
    values = magnitudes.relu() * (gates > 0)
    l1 = 2.0 * (gates.relu() * dictionary.W_dec.norm(dim=1)).sum()
    frozen = target - gates.relu() @ dictionary.W_dec.detach() - dictionary.b_dec.detach()
    extra = l1_share(l1, target) + share(frozen, target)
    return plain_loss(dictionary, x, target, dead, values, extra)


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


def plain_jumprelu(dictionary, x, target, dead):
    """As f = scores * step, the jump's gradient (equation 11) differs by scores for threshold."""
    scores, threshold = plain_scores(dictionary, x), dictionary.log_threshold.exp()
    step = PlainStep.apply(scores.detach(), threshold)
    values = scores * (scores > threshold) + threshold.detach() * (step - step.detach())
    penalty = 2.0 * PlainStep.apply(scores, threshold).sum()
    extra = penalty / target.numel()
    return plain_loss(dictionary, x, target, dead, values, extra)


def plain_matching_pursuit(dictionary, x, target, dead):
    """Codes that a slow reference finds, held constant."""
    with torch.no_grad():
        codes = eager.matching_pursuit(x - dictionary.b_dec, dictionary.W_dec, 5).to_dense()
    return share(target - codes @ dictionary.W_dec - dictionary.b_dec, target)


PLAIN_LOSS = {
    "standard": plain_standard,
    "gated": plain_gated,
    "topk": plain_topk,
    "batch_topk": plain_batch_topk,
    "jumprelu": plain_jumprelu,
    "matryoshka": plain_matryoshka,
    "matching_pursuit_refit": plain_matching_pursuit,
    "crosscoder": plain_crosscoder,
    "l1_crosscoder": plain_standard,
}


@pytest.mark.parametrize("kind", kinds_configured_by(AuxiliaryConfig), ids=architecture)
def test_the_auxiliary_loss_alone_reaches_the_weights_of_dead_latents(kind, generator, x):
    dictionary = build(kind, generator)
    x = x[:3].repeat(8, 1)  # few different rows, so that some latents are never on
    off = dictionary.training_loss(x, x, context_for(x)).codes.firing_counts() == 0
    with_aux = dictionary.training_loss(x, x, context_for(x, off)).total
    with_aux.backward()
    assert dictionary.encoder.grad[off].abs().sum() > 0
    assert dictionary.W_dec.grad[off].abs().sum() > 0
    dictionary.zero_grad()
    dictionary.training_loss(x, x, context_for(x)).total.backward()
    assert dictionary.encoder.grad[off].abs().sum() == 0


def gradients_of_a_step(dictionary, x):
    dictionary.zero_grad()
    dictionary.training_loss(x, x, context_for(x)).total.backward()
    return {name: parameter.grad.clone() for name, parameter in dictionary.named_parameters()}


def with_coefficient(kind, coefficient, x):
    dictionary = build(kind, torch.Generator().manual_seed(3))
    dictionary.penalty.coefficient.fill_(coefficient)
    return gradients_of_a_step(dictionary, x)


def test_the_penalty_of_standard_pushes_the_latents_that_are_on_and_no_others(x):
    without, weighed = (with_coefficient(Standard, c, x) for c in (0.0, 2.0))
    on = build(Standard, torch.Generator().manual_seed(3)).encode(x).firing_counts() > 0
    pushed = weighed["b_enc"] - without["b_enc"]
    assert (pushed[on] > 0).all()
    assert (pushed[~on] == 0).all()


def test_gates_learn_from_the_penalty_and_from_the_reconstruction_that_is_theirs(x):
    """What a gate opens passes no gradient, so the two losses alone can move its bias."""
    without, weighed = (with_coefficient(Gated, c, x) for c in (0.0, 2.0))
    assert without["b_enc"].abs().sum() > 0
    assert not torch.equal(without["b_enc"], weighed["b_enc"])
    # Neither reaches the magnitudes, nor the gates' reconstruction the decoder.
    for name in ("r_mag", "b_mag"):
        torch.testing.assert_close(without[name], weighed[name])
    dictionary = build(Gated, torch.Generator().manual_seed(3))
    codes = dictionary.encode(x).to_dense()
    error = x - codes @ dictionary.W_dec - dictionary.b_dec
    plain = -2 * codes.T @ error / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(without["W_dec"], plain.detach())


def test_the_count_of_jump_relu_moves_thresholds_alone_and_up(x):
    without, weighed = (with_coefficient(JumpReLU, c, x) for c in (0.0, 2.0))
    assert ((weighed["log_threshold"] - without["log_threshold"]) < 0).any()
    assert ((weighed["log_threshold"] - without["log_threshold"]) <= 0).all()
    for name in ("encoder", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(weighed[name], without[name])


def test_the_loss_of_a_prefix_trains_that_prefix_alone(generator, x):
    dictionary = build(Matryoshka, generator)
    dictionary.config = dataclasses.replace(dictionary.config, prefix_weights=(0.0, 1.0, 0.0))
    gradients = gradients_of_a_step(dictionary, x)
    middle = dictionary.prefixes[1]
    assert gradients["W_dec"][:middle].abs().sum() > 0
    assert gradients["W_dec"][middle:].abs().sum() == 0
    assert gradients["encoder"][middle:].abs().sum() == 0


@pytest.mark.parametrize("kind", kinds_configured_by(AuxiliaryConfig), ids=architecture)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_dead_latents_do_not_spoil_a_small_batch(kind, n, generator, x):
    """The last of a run may have any number of rows."""
    dictionary, few = build(kind, generator), x[:n]
    dead = torch.arange(D_SAE) % 3 == 0
    context = dataclasses.replace(context_for(few, dead), variance=torch.tensor(float(n)))
    loss = dictionary.training_loss(few, few, context)
    loss.total.backward()
    assert float(loss.terms["auxiliary"]) < 10
    assert (float(loss.terms["auxiliary"]) == 0) == (n == 1)
    assert all(p.grad.isfinite().all() for p in dictionary.parameters())


def test_pursuit_in_a_bfloat16_dictionary_fits_in_float32(generator, x):
    dictionary = build(MatchingPursuit, generator)
    fvus = []
    for dtype in (torch.float32, torch.bfloat16):
        codes = dictionary.to(dtype).encode(x)
        assert codes.values.dtype == dtype
        dense = codes.to_dense().float() @ dictionary.W_dec.float() + dictionary.b_dec.float()
        fvus.append(float(share(x - dense, x).detach()))
    assert fvus[1] < 1.05 * fvus[0]


def test_a_restarted_latent_stands_for_its_new_direction_alone(dictionary, x):
    latents = torch.tensor([2, 7])
    directions = torch.nn.functional.normalize(x[:2], dim=1)
    before = {name: p.clone() for name, p in dictionary.named_parameters()}
    dictionary.restart(latents, directions, x[:2])
    assert torch.equal(dictionary.W_dec[latents], directions)
    others = [i for i in range(D_SAE) if i not in (2, 7)]
    if isinstance(dictionary, SparseAutoencoder):
        expected = 0.2 * before["encoder"][others].norm(dim=1).mean()
        torch.testing.assert_close(dictionary.encoder[latents].norm(dim=1), expected.expand(2))
    for name, parameter in dictionary.named_parameters():
        if parameter.shape[0] == D_SAE:
            assert torch.equal(parameter[others], before[name][others]), name


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TopK, {"learning_rate": -1e-3}, "rate must not be negative"),
        (TopK, {"warmup_fraction": 3.0}, "warmup_fraction and decay_fraction"),
        (MatchingPursuit, {"decay_fraction": -0.1}, "warmup_fraction and decay_fraction"),
        (TopK, {"dead_after_tokens": 0}, "dead_after_tokens must be at least 1"),
        (TopK, {"auxiliary_k": 0}, "auxiliary_k must be at least 1"),
        (BatchTopK, {"auxiliary_weight": -1.0}, "auxiliary_weight at least 0"),
        (BatchTopK, {"threshold_decay": 1.0}, "threshold_decay must be"),
        (Matryoshka, {"prefix_weights": (1, -1, 1)}, "must not be negative nor all 0"),
        (Matryoshka, {"prefix_weights": (0, 0, 0)}, "must not be negative nor all 0"),
        (Standard, {"sparsity_coefficient": float("nan")}, "sparsity_coefficient must not"),
        (Standard, {"initial_l0": -3.0}, "initial_l0 at least 0"),
        (Gated, {"penalty_warmup_fraction": 2.0}, "penalty_warmup_fraction must be"),
        (JumpReLU, {"bandwidth": 0.0}, "bandwidth > 0"),
        (JumpReLU, {"frequent": 0.0}, "frequent > 0"),
    ],
)
def test_a_number_out_of_range_is_named_before_anything_is_trained(kind, options, message):
    config = kind.config_type(**{**SMALL[kind.architecture], **options})
    with pytest.raises(ValueError, match=message):
        kind(config, D_IN, D_SAE)


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
        dictionary.b_dec[0] = torch.nan
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        dictionary.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_config_belongs_to_one_kind(kind):
    config = kind.config_type(**SMALL[kind.architecture])
    assert dictionary_type(config) is kind
    assert dataclasses.is_dataclass(config)


def test_pursuit_sees_atoms_that_were_changed_behind_its_back(generator, x):
    """The Gram matrix is kept between calls, but never beyond the atoms it belongs to."""
    dictionary = build(MatchingPursuit, generator)
    dictionary.encode(x)
    dictionary.W_dec.data.copy_(dictionary.W_dec.data.flip(0))
    atoms, centre = dictionary.W_dec.detach(), dictionary.b_dec.detach()
    expected = eager.matching_pursuit(x - centre, atoms, 5)
    torch.testing.assert_close(
        dictionary.encode(x).to_dense(), expected.to_dense(), atol=1e-4, rtol=1e-4
    )
