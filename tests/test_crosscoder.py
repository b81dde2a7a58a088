"""Crosscoders on residual streams whose features are known, and the measures of how they lie."""

import math

import pytest
import torch
from tiny_models import tiny_model, token_ids

import saefeat as sf
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.crosscoder import Crosscoder, held
from saefeat.kernels.codes import Codes
from saefeat.metrics import (
    ablation_costs,
    decoder_cosines,
    effective_layers,
    feature_growth,
    features_held,
    layer_profile,
    peak_share,
    reuse,
)
from saefeat.report.record import Report
from saefeat.superposition.joint_features import JointFeatures
from saefeat.training.new_bank import group_name
from saefeat.training.requirements import Requirements

N_LAYERS, WIDTH, EACH = 4, 32, 24
HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
SHAPES = ("private", "persisting", "rotating", "spread over two")
ROTATION = 0.3
"""Radians by which a rotating feature turns from layer to layer."""
OPTIONS = {"expansion_factors": [6], "n_tokens": 300_000, "progress": False}
RECIPE = {"k": 2, "k_start_factor": 4}


def unit(generator, *shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def true_directions(generator, n_layers=N_LAYERS, n_of_shapes=4 * (EACH,)):
    """[F, L, d], so many features of each of `SHAPES`, of length 1 wherever they are."""
    features = torch.zeros(len(SHAPES), max(n_of_shapes), n_layers, WIDTH)
    angles = ROTATION * torch.arange(n_layers)[:, None]
    for i in range(max(n_of_shapes)):
        features[0, i, i % n_layers] = unit(generator, WIDTH)
        features[1, i] = unit(generator, WIDTH)
        start, other = unit(generator, 2, WIDTH)
        other = torch.nn.functional.normalize(other - (start @ other) * start, dim=0)
        features[2, i] = angles.cos() * start + angles.sin() * other
        first = i % (n_layers - 1)
        features[3, i, first : first + 2] = unit(generator, 2, WIDTH)
    return torch.cat([own[:n] for own, n in zip(features, n_of_shapes, strict=True)])


def stream_of(directions, generator):
    """Layers of very different norm and mean, a fiftieth of the features on in each row."""
    n_features, n_layers, _ = directions.shape
    shape = (60_000, n_features)
    strength = 0.5 + torch.rand(shape, generator=generator)
    features = strength * (torch.rand(shape, generator=generator) < 0.02)
    x = torch.einsum("nf,fld->lnd", features, directions)
    x += 0.05 * torch.randn(x.shape, generator=generator)
    x += 0.15 * torch.randn(n_layers, 1, WIDTH, generator=generator)
    rows = {f"blocks.{i}.hook_resid_post": (1 + 3 * i) * own for i, own in enumerate(x)}
    return sf.ActivationStream.from_tensors(rows, batch_size=512)


@pytest.fixture(scope="module")
def directions():
    return true_directions(torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stream(directions):
    return stream_of(directions, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bank(stream):
    return sf.train(stream, sf.CrosscoderConfig(**RECIPE), **OPTIONS)


@pytest.fixture(scope="module")
def crosscoder(bank):
    (one,) = bank.values()
    return one


@pytest.fixture(scope="module")
def row(bank, stream):
    (row,) = sf.measure(bank, stream, n_tokens=6_000, progress=False).rows
    return row


def held_out(stream, n=6_000):
    batches = list(stream.held_out_batches(n))
    return {hook: torch.cat([batch[hook] for batch in batches]) for hook in stream.hooks}


def cosines_with(crosscoder, directions):
    """[d_sae, F], over all layers together."""
    rows = crosscoder.balanced(crosscoder.W_dec)
    rows, features = (
        torch.nn.functional.normalize(one, dim=1) for one in (rows, directions.flatten(1))
    )
    return rows @ features.T


def test_reuse_and_effective_layers_come_out_within_a_tenth_of_the_truth(row, directions):
    truth = directions.norm(dim=2)
    assert reuse(truth) == 2.75  # 1, 4, 4 and 2 layers
    assert row.layer_profile["reuse"] == pytest.approx(2.75, rel=0.1)
    true_layers = float(effective_layers(truth).mean())
    assert row.layer_profile["effective_layers"] == pytest.approx(true_layers, rel=0.1)
    held_at = list(features_held(truth).tolist())
    assert list(row.layer_profile["features_held"].values()) == pytest.approx(held_at, rel=0.1)


def test_the_number_of_features_comes_out_within_a_tenth_of_the_truth(row, directions):
    assert row.layer_profile["n_features"] == pytest.approx(len(directions), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_layers", "n_of_shapes", "true_reuse", "seed"),
    [
        (12, (24, 24, 24, 24), 6.75, 0),
        (12, (24, 24, 24, 24), 6.75, 1),
        (12, (24, 24, 24, 24), 6.75, 2),
        (12, (70, 8, 8, 10), 2.9375, 0),
        (12, (8, 44, 36, 8), 10.25, 0),
        (8, (24, 24, 24, 24), 4.75, 0),
    ],
)
def test_reuse_comes_out_within_a_tenth_however_many_layers_share_how_much(
    n_layers, n_of_shapes, true_reuse, seed
):
    """Where latents that fired all counted it was 4 to 72 % too high."""
    generator = torch.Generator().manual_seed(seed)
    directions = true_directions(generator, n_layers, n_of_shapes)
    stream = stream_of(directions, generator)
    bank = sf.train(stream, sf.CrosscoderConfig(k=2), **OPTIONS)
    (row,) = sf.measure(bank, stream, n_tokens=6_000, features=0, progress=False).rows
    assert reuse(directions.norm(dim=2)) == true_reuse
    found = row.layer_profile
    assert found["reuse"] == pytest.approx(true_reuse, rel=0.1)
    assert found["effective_layers"] == pytest.approx(true_reuse, rel=0.1)
    assert found["n_features"] == pytest.approx(len(directions), rel=0.1)


@pytest.mark.slow
def test_ranked_by_length_features_of_one_of_twelve_layers_are_on_as_often_as_they_are():
    generator = torch.Generator().manual_seed(0)
    directions = true_directions(generator, 12, (8, 44, 36, 8))
    stream = stream_of(directions, generator)
    x = torch.cat(list(held_out(stream).values()), dim=1)
    shares = {}
    for rank_by in ("summed_norm", "length"):
        config = sf.CrosscoderConfig(k=2, rank_by=rank_by)
        bank = sf.train(stream, config, **OPTIONS)
        (one,) = bank.values()
        latents = cosines_with(one, directions).max(0).indices[:8]
        shares[rank_by] = one.encode(x).firing_counts()[latents].double().mean() / len(x) / 0.02
        report = sf.measure(bank, stream, features=0, progress=False)
    assert shares["summed_norm"] < 0.1
    assert shares["length"] > 0.5
    # Few others fire besides.
    assert report.rows[0].n_alive == pytest.approx(len(directions), rel=0.05)
    assert report.rows[0].layer_profile["reuse"] == pytest.approx(10.25, rel=0.02)


def test_copies_and_latents_that_no_hook_would_miss_are_no_features_of_their_own(generator):
    """A weak latent of one hook is: the hooks' variances are what costs are shares of."""
    one = random_crosscoder(generator, d_sae=8)
    with torch.no_grad():
        one.W_dec.copy_(torch.eye(12)[:8])
        one.W_dec[1] = one.W_dec[0] + 0.8 * one.W_dec[1]  # with 0 on every row: its copy
        one.W_dec[2] = one.W_dec[0] + 0.8 * one.W_dec[2]  # as near, on other rows
        one.normalise_decoder()
    on = torch.rand(4_000, 8, generator=generator) < 0.1
    on[:, 1] = on[:, 0]
    codes = on.float()
    codes[:, 5:] *= 0.01  # all of hook "b", whose variance is theirs alone
    codes[:, 3] *= 0.02  # and one of hook "a", where the others are strong
    codes = Codes.from_dense(codes)
    found = JointFeatures(one)
    target = codes.to_dense() @ one.W_dec
    for rows in (slice(0, 1_500), slice(1_500, None)):  # in two batches
        part = Codes.from_dense(codes.to_dense()[rows])
        found.update(part, target[rows], target[rows])
    assert found.stands_for.tolist() == [0, 0, 2, 3, 4, 5, 6, 7]
    assert found.counted.tolist() == [True, False, True, False, True, True, True, True]
    assert found.fvu_by_hook == {"a": 0, "b": 0}
    blocks = [(target[:, :5], slice(0, 5)), (target[:, 5:], slice(5, 12))]
    expected = [ablation_costs(codes, one.W_dec[:, own], x, x) for x, own in blocks]
    torch.testing.assert_close(found.costs, torch.stack(expected).amax(0))


def test_a_latent_lies_over_the_layers_as_its_feature_does(crosscoder, directions):
    match = cosines_with(crosscoder, directions).max(0)
    assert (match.values > 0.9).float().mean() > 0.95
    profiles = crosscoder.hook_norms[match.indices]
    true_profiles = directions.norm(dim=2)
    own, true = effective_layers(profiles), effective_layers(true_profiles)
    for index, shape in enumerate(SHAPES):
        block = slice(index * EACH, (index + 1) * EACH)
        assert float(own[block].median()) == pytest.approx(float(true[block].mean()), rel=0.05), (
            shape
        )


def test_decoder_cosines_tell_a_rotating_feature_from_a_persisting_one(crosscoder, directions):
    latents = cosines_with(crosscoder, directions).max(0).indices
    cosines = decoder_cosines(crosscoder)[latents]
    persisting, rotating = cosines[EACH : 2 * EACH], cosines[2 * EACH : 3 * EACH]
    for distance in range(1, N_LAYERS):
        assert float(persisting[:, 0, distance].median()) > 0.98
        assert float(rotating[:, 0, distance].median()) == pytest.approx(
            math.cos(ROTATION * distance), abs=0.03
        )


def test_the_scale_of_a_hook_changes_nothing_but_that_scale(stream):
    rows = held_out(stream)
    trained = []
    for factor in (1.0, 64.0):  # a power of two, so that no rounding differs
        scaled = {hook: x * (factor if hook == HOOKS[1] else 1.0) for hook, x in rows.items()}
        own = sf.ActivationStream.from_tensors(scaled, batch_size=512)
        bank = sf.train(own, sf.CrosscoderConfig(k=2), **{**OPTIONS, "n_tokens": 5_000})
        (one,) = bank.values()
        x = torch.cat(list(scaled.values()), dim=1)
        (row,) = sf.measure(bank, own, n_tokens=500, progress=False).rows
        trained.append((one, one.encode(x), row))
    (plain, codes, row), (other, other_codes, other_row) = trained
    assert torch.equal(codes.latents, other_codes.latents)
    torch.testing.assert_close(
        codes.values * plain.decoder_norms[codes.latents],
        # In units of the geometric mean of the scales.
        other_codes.values * other.decoder_norms[codes.latents] / 64 ** (1 / N_LAYERS),
    )
    shares = (one.hook_norms / one.decoder_norms[:, None] for one in (plain, other))
    torch.testing.assert_close(*shares)
    assert row.fvu == pytest.approx(other_row.fvu, rel=1e-5)
    assert row.fvu_by_hook == pytest.approx(other_row.fvu_by_hook, rel=1e-5)
    assert row.layer_profile["reuse"] == other_row.layer_profile["reuse"]


def test_the_fvu_of_all_hooks_is_the_share_of_their_scaled_variance(crosscoder, stream, row):
    rows = held_out(stream)
    x = torch.cat(list(rows.values()), dim=1)
    error = variance = 0.0
    parts = crosscoder(x).split(crosscoder.widths, dim=1)
    for (hook, own), recon in zip(rows.items(), parts, strict=True):
        weight = float(own.norm(dim=1).mean()) ** -2  # mean norm 1
        error += weight * float((own - recon).square().sum())
        variance += weight * float((own - own.mean(0)).square().sum())
        fvu = sf.metrics.fraction_variance_unexplained(own, recon)
        assert row.fvu_by_hook[hook] == pytest.approx(float(fvu), rel=1e-4)
    assert row.fvu == pytest.approx(error / variance, rel=0.01)
    assert row.n_neurons == N_LAYERS * WIDTH
    assert row.layer is None
    assert row.ce_loss_recovered is None


def test_folding_scales_in_and_out_again_keeps_outputs(generator):
    one, x = random_crosscoder(generator), torch.randn(50, 12, generator=generator)
    scales = torch.tensor([3.0] * 5 + [0.2] * 7)
    codes, recon = one.encode(x * scales).to_dense(), one(x * scales)
    one.fold_scales([3.0, 0.2])
    mean = math.sqrt(3.0 * 0.2)
    torch.testing.assert_close(one.encode(x).to_dense() * mean, codes)
    torch.testing.assert_close(one(x) * scales, recon)
    one.fold_scales([1 / 3.0, 1 / 0.2])
    torch.testing.assert_close(one(x * scales), recon)
    torch.testing.assert_close(one.hook_scales, torch.ones(2))


def test_a_bank_of_crosscoders_is_trained_further_from_where_it_was(bank, stream):
    x = torch.cat(list(held_out(stream).values()), dim=1)
    (key,) = bank
    before = sf.metrics.fraction_variance_unexplained(x, bank[key](x))
    further = sf.train(stream, bank, n_tokens=1_024, progress=False)
    after = sf.metrics.fraction_variance_unexplained(x, further[key](x))
    assert float(after) < 1.3 * float(before)
    assert further[key].origin.n_tokens == bank[key].origin.n_tokens + 1_024


@pytest.mark.parametrize(("rank_by", "n_on"), [("summed_norm", 1), ("length", 0)])
def test_more_of_the_summed_decoder_norm_wins_at_equal_value(generator, rank_by, n_on):
    """Selection is by value times summed norm or, if asked for, by the length of the row."""
    one = random_crosscoder(generator, d_sae=2, rank_by=rank_by)
    with torch.no_grad():
        one.W_dec.zero_()
        one.W_dec[0, 0] = 1.0  # one hook, summed norm 1
        one.W_dec[1, [0, 5]] = 0.5**0.5  # two hooks, summed norm 1.41
        one.encoder.copy_(torch.eye(12)[:2])
        one.b_enc.zero_()
        one.b_dec.zero_()
        one.threshold_sum.fill_(1.2)
        one.threshold_weight.fill_(1.0)
    x = torch.zeros(1, 12)
    x[0, :2] = 1.0
    assert one.encode(x).latents.tolist() == [1][:n_on]
    one.threshold_sum.fill_(0.99 if rank_by == "length" else 1.41)
    assert one.encode(x).latents.tolist() == ([0, 1] if rank_by == "length" else [1])


# Weakly causal


def test_a_causal_latent_reads_up_to_its_source_and_writes_from_it_on(stream):
    config = sf.CrosscoderConfig(causal=True, **RECIPE)
    bank = sf.train(stream, config, **{**OPTIONS, "n_tokens": 20_000})
    (one,) = bank.values()
    encoders, decoders = (
        torch.stack(weight.split(WIDTH, dim=1), dim=1).norm(dim=2)
        for weight in (one.encoder, one.W_dec)
    )
    layers = torch.arange(N_LAYERS)
    reads, writes = layers <= one.sources[:, None], layers >= one.sources[:, None]
    assert (encoders[~reads] == 0).all()
    assert (decoders[~writes] == 0).all()
    assert (decoders[writes] > 0).float().mean() > 0.9
    assert (encoders[reads] > 0).float().mean() > 0.9
    assert one.sources.bincount().tolist() == [one.d_sae // N_LAYERS] * N_LAYERS
    # What comes later cannot change a latent.
    rows = held_out(stream, 200)
    changed = {**rows, HOOKS[3]: rows[HOOKS[3]].flip(0)}
    before, after = (
        one.encode(torch.cat(list(x.values()), dim=1)).to_dense() for x in (rows, changed)
    )
    earlier = one.sources < 3
    torch.testing.assert_close(before[:, earlier], after[:, earlier])
    assert not torch.equal(before[:, ~earlier], after[:, ~earlier])


def test_a_restarted_latent_stays_causal(generator):
    one = random_crosscoder(generator, kind="l1", causal=True)
    directions = torch.nn.functional.normalize(torch.randn(2, 12, generator=generator), dim=1)
    one.restart(torch.tensor([0, 39]), directions, torch.randn(2, 12, generator=generator))
    assert one.sources[[0, 39]].tolist() == [0, 1]
    assert (one.encoder[0, 5:] == 0).all()
    assert (one.W_dec[39, :5] == 0).all()
    torch.testing.assert_close(one.W_dec[[0, 39]].norm(dim=1), torch.ones(2))


# The dictionary of one hook


def test_the_dictionary_of_a_hook_reads_and_explains_that_hook_alone(crosscoder, stream, row):
    rows = held_out(stream)
    for hook, x in rows.items():
        own = crosscoder.layer(hook)
        assert (own.hook_name, own.d_in, own.d_sae) == (hook, WIDTH, crosscoder.d_sae)
        assert own.origin.hook_widths is None
        fvu = float(sf.metrics.fraction_variance_unexplained(x, own(x)))
        assert row.fvu_by_hook[hook] < fvu < 0.5, hook
        kept = own.W_dec.norm(dim=1) > 0
        assert not (kept & ~held(crosscoder.hook_norms)[:, HOOKS.index(hook)]).any()
        torch.testing.assert_close(own.W_dec[kept].norm(dim=1), torch.ones(int(kept.sum())))
        # It does not make up by many latents what it cannot read.
        codes = crosscoder.encode(torch.cat(list(rows.values()), dim=1)).to_dense()
        assert sf.metrics.l0(own.encode(x)) < 1.2 * (codes[:, kept] > 0).sum() / len(x)
        assert set(own.encode(x).latents.tolist()) <= set(kept.nonzero().squeeze(1).tolist())


@pytest.mark.parametrize("kind", ["batch_topk", "l1"])
def test_the_dictionary_of_a_hook_is_exact_for_latents_of_that_hook_alone(generator, kind):
    one = random_crosscoder(generator, kind=kind)
    with torch.no_grad():
        for weight in (one.encoder, one.W_dec):
            weight[:20, 5:] = 0
            weight[20:, :5] = 0
        one.encoder.copy_(2 * one.W_dec)
        one.normalise_decoder()
    one.fold_scales([3.0, 0.2])
    x = torch.randn(50, 12, generator=generator)
    whole = one.decode(one.encode(x)).split([5, 7], dim=1)
    for index, hook in enumerate(one.hook_widths):
        part = one.layer(hook)
        torch.testing.assert_close(part(x.split([5, 7], dim=1)[index]), whole[index])


@pytest.mark.parametrize("kind", ["batch_topk", "l1"])
def test_sae_lens_opens_the_dictionary_of_a_hook_with_equal_outputs(generator, tmp_path, kind):
    sae_lens = pytest.importorskip("sae_lens")
    part = random_crosscoder(generator, kind=kind).layer("b")
    theirs = sae_lens.SAE.load_from_disk(str(part.save(tmp_path / "part")))
    x = torch.randn(50, 7, generator=generator)
    assert part.encode(x).values.numel() > 0
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), part(x), atol=1e-5, rtol=1e-5)


def test_a_hook_that_is_not_read_has_no_dictionary(crosscoder):
    with pytest.raises(KeyError, match=r"it has blocks\.0\.hook_resid_post"):
        crosscoder.layer("blocks.9.hook_resid_post")


# Groups, files and plans


def test_a_group_has_the_hooks_that_its_patterns_match_and_the_name_it_was_given(stream):
    groups = {"early": ["blocks.[01].*"], "ends": [HOOKS[3], HOOKS[0]]}
    options = {**OPTIONS, "n_tokens": 1_000, "expansion_factors": [0.5, 2]}
    bank = sf.train(stream, sf.CrosscoderConfig(k=2), groups=groups, **options)
    assert list(bank) == [(name, factor, 0) for name in groups for factor in (0.5, 2)]
    assert list(bank["early", 2, 0].hook_widths) == HOOKS[:2]
    assert list(bank["ends", 2, 0].hook_widths) == [HOOKS[3], HOOKS[0]]
    assert bank.hooks == [HOOKS[0], HOOKS[1], HOOKS[3]]
    assert bank["early", 2, 0].d_sae == 2 * WIDTH
    assert bank["early", 2, 0].d_in == 2 * WIDTH
    report = sf.measure(bank, stream, n_tokens=500, progress=False)
    assert [row.hook_name for row in report.rows] == ["early", "early", "ends", "ends"]
    assert [layer.hook_name for layer in report.layers] == ["early", "ends"]


def test_a_group_without_a_name_is_called_by_its_hooks():
    assert group_name(["a", "b"]) == "a+b"
    assert group_name(["a", "b", "c", "d"]) == "a+...+d"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": {"g": ["blocks.7.*"]}}, "does not read"),
        ({"groups": {"g": HOOKS[0]}}, "give a list"),
        ({"groups": {"g": []}}, "at least one hook"),
        ({"groups": {HOOKS[0]: HOOKS[1:]}}, "no other hook"),
        ({"groups": {"a/b": HOOKS}}, "without a slash"),
        ({"targets": {HOOKS[0]: HOOKS[1]}}, "for transcoders"),
    ],
)
def test_groups_that_make_no_crosscoder_are_an_error(stream, options, message):
    with pytest.raises(ValueError, match=message):
        sf.train(stream, sf.CrosscoderConfig(k=2), **OPTIONS, **options)


def test_dictionaries_of_one_hook_have_no_groups(stream):
    with pytest.raises(ValueError, match="groups are for crosscoders"):
        sf.train(stream, sf.TopKConfig(k=2), groups={"g": HOOKS}, **OPTIONS)


def test_a_transcoder_is_no_crosscoder():
    with pytest.raises(ValueError, match="cannot be a transcoder"):
        Crosscoder(sf.CrosscoderConfig(k=2), 12, 40, None, 9)
    with pytest.raises(ValueError, match="sum to d_in=12"):
        Crosscoder(sf.CrosscoderConfig(k=2), 12, 40, Origin(hook_widths={"a": 5}))


def test_a_run_on_disk_gives_the_same_crosscoder_again(stream, tmp_path):
    options = {**OPTIONS, "n_tokens": 3_000, "groups": {"all": HOOKS}}
    config = sf.CrosscoderConfig(k=2)
    (in_memory,) = sf.train(stream, config, **options).values()
    sf.train(stream, config, out=tmp_path / "run", checkpoint_every=2, **options)
    loaded = sf.Bank.load(tmp_path / "run")
    assert list(loaded) == [("all", 6, 0)]
    on_disk = loaded["all", 6, 0]
    assert list(on_disk.hook_widths) == HOOKS
    torch.testing.assert_close(on_disk.hook_norms, in_memory.hook_norms)
    x = torch.cat(list(held_out(stream, 300).values()), dim=1)
    assert torch.equal(on_disk(x), in_memory(x))
    other = {**options, "groups": {"all": HOOKS[:3]}}
    with pytest.raises(ValueError, match="cannot be gone on with"):
        sf.train(stream, config, out=tmp_path / "run", resume=True, **other)


def test_a_report_of_crosscoders_is_saved_and_loaded_whole(bank, stream, tmp_path):
    report = sf.measure(bank, stream, n_tokens=500, progress=False)
    loaded = Report.load(report.save(tmp_path / "report"))
    assert loaded.rows == report.rows
    assert "is held by" in str(report)


def test_a_crosscoder_has_the_weights_of_one_dictionary_of_each_hook(stream):
    options = {
        "expansion_factors": (8,),
        "seeds": (0,),
        "targets": None,
        "n_tokens": 10_000,
        "log_every": 10,
        "checkpoint_every": 500,
        "keep_last": 2,
        "device": torch.device("cpu"),
    }
    config, plain = sf.CrosscoderConfig(k=2), sf.BatchTopKConfig(k=2)
    one = Requirements.of(stream, config, groups=None, **options)
    each = Requirements.of(stream, plain, groups=None, **options)
    d_sae = 8 * WIDTH
    assert one.n_parameters == 2 * d_sae * N_LAYERS * WIDTH + d_sae + N_LAYERS * WIDTH
    biases = (N_LAYERS - 1) * d_sae  # of the encoders that it does not have
    assert each.n_parameters == one.n_parameters + biases
    parts, of_each = one.host_parts, each.host_parts
    assert parts["weights, gradients, Adam"] < of_each["weights, gradients, Adam"]
    assert sf.plan(stream, config, n_tokens=10_000, progress=False).n_parameters == (
        one.n_parameters
    )


def test_rows_of_two_models_are_of_the_same_tokens():
    tokens = sf.load_tokens(token_ids(40, 16), prepend_bos=False)
    models = {"a": tiny_model("HookedTransformer"), "b": tiny_model("bridge of GPT-2")}
    hook = "blocks.1.hook_resid_post"
    both = sf.ActivationStream.from_models(models, tokens, hook, batch_size=64, max_norm_ratio=None)
    assert both.hooks == [f"{hook}@a", f"{hook}@b"]
    assert both.model_name == "a+b"
    alone = {
        name: sf.ActivationStream.from_model(
            model, tokens, hook, batch_size=64, max_norm_ratio=None
        )
        for name, model in models.items()
    }
    for batch, of_a, of_b in zip(both, alone["a"], alone["b"], strict=True):
        assert torch.equal(batch[f"{hook}@a"], of_a[hook])
        assert torch.equal(batch[f"{hook}@b"], of_b[hook])
    bank = sf.train(both, sf.CrosscoderConfig(k=2), n_tokens=300, progress=False)
    assert bank.hooks == both.hooks
    with pytest.raises(ValueError, match="without a slash"):
        sf.ActivationStream.from_models({"a/b": models["a"]}, tokens, hook)


# The measures


def test_profiles_of_known_shape_have_the_measures_of_that_shape():
    even, one, two = [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 3.0, 0.0], [0.0, 2.0, 2.0, 0.0]
    uneven = [3.0, 1.0, 0.2, 0.0]
    profiles = torch.tensor([even, one, two, uneven])
    expected = torch.tensor([4.0, 1.0, 2.0, (9 + 1 + 0.04) ** 2 / (81 + 1 + 0.0016)])
    torch.testing.assert_close(effective_layers(profiles), expected)
    torch.testing.assert_close(peak_share(profiles), torch.tensor([0.25, 1.0, 0.5, 9 / 10.04]))
    assert features_held(profiles).tolist() == [2, 3, 3, 1]
    assert reuse(profiles) == 9 / 4
    torch.testing.assert_close(effective_layers(1e-30 * profiles), expected)


def test_a_profile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="never fire"):
        effective_layers(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="never fire"):
        peak_share(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="undefined without latents"):
        reuse(torch.zeros(0, 3))


def test_cosines_of_hooks_of_different_widths_are_not_given(generator):
    one = random_crosscoder(generator)
    cosines = decoder_cosines(one)
    assert cosines[:, 0, 1].isnan().all()
    torch.testing.assert_close(cosines[:, 0, 0], torch.ones(40))
    profile = layer_profile(one, torch.arange(40) < 30)
    assert profile.n_features == 30
    assert profile.cosines == {"a": {"b": None}}
    assert sum(profile.layers_held.values()) == 30


def test_growth_is_the_slope_of_least_squares_with_its_standard_error():
    neurons = [100, 200, 400, 800]
    exact = feature_growth([3 * n**1.2 for n in neurons], neurons)
    assert exact.slope == pytest.approx(1.2)
    assert exact.standard_error == pytest.approx(0, abs=1e-7)
    stats = pytest.importorskip("scipy.stats")
    features = [310, 700, 1200, 3100]
    theirs = stats.linregress([math.log(n) for n in neurons], [math.log(f) for f in features])
    ours = feature_growth(features, neurons)
    assert (ours.slope, ours.n_points) == (pytest.approx(theirs.slope), 4)
    assert ours.standard_error == pytest.approx(theirs.stderr)
    assert math.isnan(feature_growth([1, 2], [1, 2]).standard_error)
    for features, spans in (([1, 2], [5, 5]), ([0, 2], [5, 6]), ([1], [5, 6])):
        with pytest.raises(ValueError, match="pairs of positive numbers"):
            feature_growth(features, spans)


def random_crosscoder(
    generator, *, kind="batch_topk", causal=False, d_sae=40, rank_by="summed_norm"
):
    """Of hooks "a" and "b", 5 and 7 wide."""
    from saefeat.dictionaries.crosscoder import L1Crosscoder

    origin = Origin(hook_name="a+b", hook_widths={"a": 5, "b": 7})
    one = (
        Crosscoder(sf.CrosscoderConfig(k=2, causal=causal, rank_by=rank_by), 12, d_sae, origin)
        if kind == "batch_topk"
        else L1Crosscoder(sf.L1CrosscoderConfig(initial_l0=10, causal=causal), 12, d_sae, origin)
    )
    sample = torch.randn(100, 12, generator=generator)
    one.initialise(generator, 0.1 * torch.randn(12, generator=generator), sample, sample)
    if kind == "batch_topk":
        one.threshold_sum.fill_(0.4)
        one.threshold_weight.fill_(0.5)
    return one.requires_grad_(False)
