"""The trainer on synthetic data whose answer is known, and what it refuses."""

import dataclasses
import json

import pytest
import torch

import saefeat as sf
from saefeat.dictionaries.topk import TopK
from saefeat.kernels import stock
from saefeat.kernels.dispatch import BACKENDS
from saefeat.training.bank_learner import BankLearner
from saefeat.training.dead_latents import DeadLatents, patience_tokens
from saefeat.training.normalisation import ActivationScale, geometric_median
from saefeat.training.schedules import learning_rate_factor, peak_learning_rate


def sparse_data(n: int, d: int, n_features: int, seed: int = 0) -> torch.Tensor:
    """Sums of two of `n_features` random unit directions, with magnitudes from 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    active = torch.rand(n, n_features, generator=generator).topk(2, dim=1).indices
    magnitudes = 1 + torch.rand(n, 2, generator=generator)
    return (magnitudes[:, :, None] * directions[active]).sum(1)


@pytest.fixture(scope="module")
def stream():
    x = sparse_data(20_000, 16, 24)
    return sf.ActivationStream.from_tensors({"a": x, "b": 40 * x + 3}, batch_size=500)


CONFIG = sf.TopKConfig(k=2, learning_rate=3e-3)


def train(stream, **changes):
    options = {"expansion_factors": [2], "seeds": [0], "n_tokens": 60_000, "progress": False}
    return sf.train(stream, CONFIG, **{**options, **changes})


def test_training_explains_data_that_two_latents_a_token_generate(stream):
    bank = train(stream, n_tokens=150_000)
    for hook_name in ("a", "b"):
        x = next(stream.held_out_batches(2_000))[hook_name]
        fvu = sf.metrics.fraction_variance_unexplained(x, bank[hook_name, 2, 0](x))
        assert fvu < 0.15


def test_decoder_rows_end_at_length_one(stream):
    sae = train(stream, n_tokens=5_000)["a", 2, 0]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-6, rtol=0)


def test_two_runs_with_one_seed_are_bitwise_identical(stream):
    first, second = (train(stream, n_tokens=10_000) for _ in range(2))
    for key in first:
        for name, tensor in first[key].state_dict().items():
            assert torch.equal(tensor, second[key].state_dict()[name]), (key, name)


def test_a_dictionary_does_not_depend_on_what_else_is_in_the_bank(stream):
    alone = train(stream, n_tokens=5_000)["b", 2, 0]
    among = train(stream, n_tokens=5_000, expansion_factors=[0.5, 2], seeds=[1, 0])["b", 2, 0]
    assert torch.equal(alone.W_dec, among.W_dec)


def first_decoder(stream, config, n_tokens):
    return next(iter(sf.train(stream, config, n_tokens=n_tokens, progress=False).values())).W_dec


@pytest.mark.parametrize(
    "config",
    [
        sf.TopKConfig(k=2),
        sf.BatchTopKConfig(k=2),
        # Most atoms are dead at once, so that a run would restart them.
        sf.MatchingPursuitConfig(k=1, dead_after_tokens=500),
    ],
)
def test_a_frozen_decoder_stays_where_it_started(stream, config):
    frozen = dataclasses.replace(config, freeze_decoder=True)
    start = first_decoder(stream, frozen, 500)
    torch.testing.assert_close(first_decoder(stream, frozen, 20_000), start, atol=1e-6, rtol=0)
    assert (first_decoder(stream, config, 20_000) - start).abs().max() > 0.1


def test_the_encoder_of_a_frozen_decoder_learns(stream):
    (short, _), (long, _) = (
        sf.train(
            stream, sf.TopKConfig(k=2, freeze_decoder=True), n_tokens=n, progress=False
        ).values()
        for n in (500, 20_000)
    )
    assert (long.W_enc - short.W_enc).abs().max() > 0.02


@pytest.mark.parametrize("last", [torch.zeros(10, 16), sparse_data(1, 16, 24)])
def test_a_last_batch_that_does_not_vary_ends_a_run_like_any_other(last):
    learner = BankLearner(
        {("a", 2, 0): TopK(CONFIG, 16, 32)},
        n_tokens=500 + len(last),
        n_steps=2,
        device=torch.device("cpu"),
        kernels=stock,
        selection_dtype=torch.float32,
    )
    learner.step({"a": sparse_data(500, 16, 24)})
    learner.step({"a": last})
    (sae,) = learner.finish().values()
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def test_seeds_differ(stream):
    bank = train(stream, n_tokens=1_000, seeds=[0, 1])
    assert not torch.equal(bank["a", 2, 0].W_dec, bank["a", 2, 1].W_dec)


def test_the_units_of_a_hook_do_not_matter():
    """Activations 1000 times as large give the same latents, and outputs 1000 times as large."""
    x = sparse_data(4_000, 16, 24)
    banks = {
        scale: train(
            sf.ActivationStream.from_tensors({"a": scale * x}, batch_size=500), n_tokens=20_000
        )
        for scale in (1.0, 1024.0)  # a power of two, so that nothing rounds differently
    }
    small, large = banks[1.0]["a", 2, 0](x), banks[1024.0]["a", 2, 0](1024 * x)
    torch.testing.assert_close(large, 1024 * small, rtol=1e-3, atol=1e-2)


def test_a_run_folder_holds_config_metrics_and_dictionaries(stream, tmp_path):
    out = tmp_path / "run"
    bank = train(stream, n_tokens=10_000, expansion_factors=[0.5, 2], out=out, log_every=7)
    config = json.loads((out / "config.json").read_text())
    assert config["hooks"] == {"a": 16, "b": 16}
    assert config["kernels"] in BACKENDS
    assert [one["expansion_factor"] for one in config["dictionaries"]] == [0.5, 2, 0.5, 2]
    assert config["dictionaries"][0]["config"]["k"] == 2
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in records} == {1, 8, 15, 20}
    assert records[-1]["n_tokens"] == 10_000
    assert len([record for record in records if record["step"] == 8]) == 4
    assert (out / "saes" / "b" / "x0.5-seed0" / "cfg.json").is_file()
    loaded = sf.Bank.load(out)
    assert list(loaded) == list(bank)
    assert torch.equal(loaded["b", 0.5, 0].W_dec, bank["b", 0.5, 0].W_dec)


def test_a_bank_trained_further_gets_better_and_the_first_one_stays(stream, tmp_path):
    bank = train(stream, n_tokens=20_000)
    before = {key: one.W_dec.clone() for key, one in bank.items()}
    further = sf.train(stream, bank, n_tokens=60_000, out=tmp_path / "run", progress=False)
    for key, one in bank.items():
        assert torch.equal(one.W_dec, before[key])
        x = next(stream.held_out_batches(2_000))[key[0]]
        fvus = [
            float(sf.metrics.fraction_variance_unexplained(x, each[key](x)))
            for each in (bank, further)
        ]
        assert fvus[1] < 0.8 * fvus[0]
        assert further[key].origin.n_tokens == 80_000
    loaded = sf.Bank.load(tmp_path / "run")
    assert torch.equal(loaded["b", 2, 0].W_dec, further["b", 2, 0].W_dec)


def test_training_further_begins_where_training_ended(stream):
    """One step at a learning rate of almost 0 changes nothing, whatever the hook's scale."""
    bank = train(stream, n_tokens=20_000)
    config = sf.TopKConfig(k=2, learning_rate=1e-12)
    for one in bank.values():
        one.config = config
    further = sf.train(stream, bank, n_tokens=500, progress=False)
    for key, one in bank.items():
        x = next(stream.held_out_batches(500))[key[0]]
        torch.testing.assert_close(further[key](x), one(x), rtol=1e-4, atol=1e-4)


def test_training_further_needs_the_hooks_of_the_bank(stream):
    bank = train(stream, n_tokens=1_000)
    other = sf.ActivationStream.from_tensors({"a": sparse_data(1_000, 16, 24)}, batch_size=500)
    with pytest.raises(ValueError, match="has nothing"):
        sf.train(other, bank, n_tokens=1_000, progress=False)


def test_a_transcoder_learns_what_one_hook_does_to_another(generator):
    """The target is a linear map of a sparse sum, of another width, scale and centre."""
    x = sparse_data(20_000, 16, 24)
    y = x @ torch.randn(16, 10, generator=generator) + 5
    stream = sf.ActivationStream.from_tensors({"in": 30 * x + 2, "out": y}, batch_size=500)
    bank = sf.train(
        stream,
        sf.TopKConfig(k=4, learning_rate=3e-3),
        targets={"in": "out"},
        expansion_factors=[3],
        n_tokens=200_000,
        progress=False,
    )
    transcoder = bank["in", 3, 0]
    assert (transcoder.d_in, transcoder.d_out, transcoder.d_sae) == (16, 10, 48)
    assert transcoder.origin.target_hook_name == "out"
    report = sf.measure(bank, stream, n_tokens=2_000, progress=False)
    assert report.rows[0].target_hook_name == "out"
    assert report.rows[0].fvu < 0.2


def test_targets_have_to_be_hooks_of_the_stream(stream):
    with pytest.raises(ValueError, match="does not read"):
        train(stream, targets={"a": "c"})


def test_dead_latents_come_back_under_the_auxiliary_loss_alone():
    """24 features, 32 latents of which 16 are made too weak to rank after the first step."""
    x = sparse_data(20_000, 16, 24)
    stream = sf.ActivationStream.from_tensors({"a": x}, batch_size=500)
    fired = {}
    for weight in (0.0, 1 / 32):
        config = sf.TopKConfig(
            k=2, learning_rate=3e-3, auxiliary_weight=weight, dead_after_tokens=1_000
        )
        learner = BankLearner(
            {("a", 2, 0): TopK(config, 16, 32)},
            n_tokens=200_000,
            n_steps=400,
            device=torch.device("cpu"),
            kernels=stock,
            selection_dtype=torch.float32,
        )
        for batch in stream.batches(200_000):
            learner.step(batch)
            if learner.step_number == 1:
                with torch.no_grad():
                    learner.learners["a"]["a", 2, 0].dictionary.encoder[:16] *= 0.05
        fired[weight] = int((learner.finish()["a", 2, 0].encode(x).firing_counts()[:16] > 0).sum())
    assert fired[0.0] == 0
    assert fired[1 / 32] >= 8


def test_a_bank_names_what_it_holds(stream):
    bank = train(stream, n_tokens=1_000)
    assert bank.hooks == ["a", "b"]
    with pytest.raises(KeyError, match="hook_name, expansion_factor, seed"):
        bank["a", 3, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expansion_factors": [0.01]}, "latents. It must be at least"),
        ({"expansion_factors": []}, "at least one"),
        ({"seeds": [1, 1]}, "each value once"),
        ({"expansion_factors": [0.06]}, "1 <= k <= d_sae, got k=2 and d_sae=1"),
        ({"n_tokens": 0}, "must be 1 or more"),
    ],
)
def test_bad_options_are_refused_before_a_folder_is_made(stream, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(stream, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(stream, tmp_path):
    train(stream, n_tokens=1_000, out=tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="run"):
        train(stream, n_tokens=1_000, out=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_the_hook(bad):
    x = sparse_data(2_000, 16, 24)
    x[:, 3] = bad
    with pytest.raises(ValueError, match="'a' holds NaN or infinity"):
        train(sf.ActivationStream.from_tensors({"a": x}, batch_size=500), n_tokens=1_000)


def test_a_constant_hook_is_refused():
    stream = sf.ActivationStream.from_tensors({"a": torch.full((2_000, 16), 0.7)}, batch_size=500)
    with pytest.raises(ValueError, match="do not vary"):
        train(stream, n_tokens=1_000)


def test_a_diverging_run_stops_with_the_learning_rate_named(stream):
    with pytest.raises(ValueError, match="lower learning_rate"):
        sf.train(
            stream,
            sf.TopKConfig(k=2, learning_rate=1e30),
            expansion_factors=[2],
            n_tokens=50_000,
            progress=False,
        )


def test_the_learning_rate_rises_holds_and_falls():
    factors = [
        learning_rate_factor(step, 100, warmup_fraction=0.1, decay_fraction=0.2)
        for step in range(100)
    ]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:80] == [1.0] * 70
    assert factors[-1] == pytest.approx(1 / 21)
    assert all(factor > 0 for factor in factors)


def test_the_default_learning_rate_goes_by_width_in_long_runs_and_by_steps_in_short_ones():
    assert peak_learning_rate(sf.TopKConfig(), 2**14, 10**7, 4096) == pytest.approx(2e-4)
    assert peak_learning_rate(sf.TopKConfig(), 2**12, 10**7, 4096) == pytest.approx(4e-4)
    assert peak_learning_rate(sf.TopKConfig(), 2**14, 100, 2048) == pytest.approx(8e-3)
    assert peak_learning_rate(sf.TopKConfig(), 2**14, 4_000, 8192) == pytest.approx(4e-3)
    assert peak_learning_rate(sf.StandardConfig(), 2**14, 4_000, 2048) == pytest.approx(2e-3)
    assert peak_learning_rate(sf.TopKConfig(learning_rate=0.5), 7, 1, 1) == 0.5


def test_the_default_learning_rate_is_lower_in_small_batches_but_not_too_low():
    rates = [peak_learning_rate(sf.TopKConfig(), 2**14, 100, n) for n in (1152, 512, 8)]
    assert rates == pytest.approx([6e-3, 4e-3, 4e-3])
    assert peak_learning_rate(sf.StandardConfig(), 2**14, 100, 8) == pytest.approx(4e-3)


def test_the_geometric_median_ignores_a_far_outlier():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(999, 3, generator=generator)
    with_outlier = torch.cat([points, torch.full((1, 3), 1e6)])
    assert (geometric_median(with_outlier) - geometric_median(points)).norm() < 0.01
    assert (with_outlier.mean(0) - points.mean(0)).norm() > 1_000


def test_the_geometric_median_of_three_points_on_a_line_is_the_middle_one():
    line = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(line), line[1], atol=1e-3, rtol=0)


def test_the_scale_brings_the_mean_norm_to_the_square_root_of_the_width():
    scale = ActivationScale(4)
    for batch in (torch.full((2, 4), 3.0), torch.full((6, 4), 1.0)):
        scale.update(batch)
    assert float(scale.factor) == pytest.approx(2 / ((2 * 6 + 6 * 2) / 8))


def test_a_latent_is_dead_after_its_patience_and_alive_once_it_fires():
    dead = DeadLatents(3, 4, torch.device("cpu"))
    codes = sf.Codes.from_rows(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1.0, 0.0]] * 2), 3)
    dead.update(codes)
    assert dead.latents.tolist() == []
    dead.update(codes)
    assert dead.latents.tolist() == [1, 2]
    assert patience_tokens(sf.TopKConfig(), 10**12) == 10_000_000
    assert patience_tokens(sf.TopKConfig(), 2_000_000) == 100_000
