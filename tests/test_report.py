"""Reports: their numbers against hand-built dictionaries, their files, and what is refused."""

import dataclasses
import json

import pytest
import torch
from tiny_models import tiny_model, token_ids

import saefeat as sf
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.topk import TopK
from saefeat.report.record import layer_number

HOOK = "blocks.1.hook_resid_post"


def identity_dictionary(d_in, k=None, hook_name="a", factor=1.0, seed=0):
    """Latent i is coordinate i, so that positive activations come back exactly if k allows."""
    sae = TopK(sf.TopKConfig(k=k or d_in), d_in, d_in, Origin(hook_name=hook_name))
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(d_in))
        sae.W_dec.copy_(torch.eye(d_in))
    return sae.with_origin(expansion_factor=factor, seed=seed)


def signed_dictionary(d_in, hook_name):
    """Two latents a coordinate, one for each sign: an exact copy of any activations."""
    sae = TopK(sf.TopKConfig(k=d_in), d_in, 2 * d_in, Origin(hook_name=hook_name))
    both = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    with torch.no_grad():
        sae.encoder.copy_(both)
        sae.W_dec.copy_(both)
    return sae


@pytest.fixture
def rows():
    """Coordinate 0 always on, 1 on in half of the rows, 2 in a tenth, 3 never."""
    x = torch.zeros(40, 4)
    x[:, 0] = 1 + torch.arange(40) / 40
    x[::2, 1] = 0.5
    x[::10, 2] = 0.25
    return x


@pytest.fixture
def stream(rows):
    x = torch.cat([rows, rows])
    return sf.ActivationStream.from_tensors({"a": x}, batch_size=10, held_out_fraction=0.5)


@pytest.fixture
def report(stream):
    bank = sf.Bank(
        {("a", 1.0, 0): identity_dictionary(4), ("a", 1.0, 1): identity_dictionary(4, 1)}
    )
    return sf.measure(bank, stream, n_tokens=40)


def test_l0_and_density_are_those_of_the_rows(report, stream):
    held_out = torch.cat([batch["a"] for batch in stream.held_out_batches()])
    density = (held_out > 0).float().mean(0)
    row = report.rows[0]
    assert row.l0 == pytest.approx(float(density.sum()))
    torch.testing.assert_close(report.densities["a/x1-seed0"], density)
    assert row.n_alive == int((density > 0).sum()) == 3
    assert row.dead_fraction == 0.25
    assert row.features_per_neuron == 0.75


def test_an_exact_dictionary_leaves_no_variance_and_one_latent_leaves_what_it_must(report, stream):
    held_out = torch.cat([batch["a"] for batch in stream.held_out_batches()])
    assert report.rows[0].fvu == pytest.approx(0, abs=1e-12)
    rest = held_out[:, 1:].square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert report.rows[1].fvu == pytest.approx(float(rest), rel=1e-6)
    assert report.rows[1].explained_variance == pytest.approx(1 - float(rest), rel=1e-6)


def test_a_layer_with_two_seeds_has_what_they_share(report, stream):
    (layer,) = report.layers
    # Three latents are alive in the one, and one of these in the other.
    assert layer.n_features["estimate"] == layer.n_features["low"] == 1
    assert layer.coverage == pytest.approx(1 - 2 / 4)
    assert layer.identifiable is False
    assert layer.n_features["high"] is None
    assert "two of 2 seeds" in layer.n_features["method"]
    density = torch.cat([batch["a"] for batch in stream.held_out_batches()]).gt(0).double().mean(0)
    loads = [torch.special.entr(density).sum() / 4, 0.0]  # the lone latent is always on: ln 1 = 0
    assert layer.load == pytest.approx(float(sum(loads) / 2))
    assert "at least 1 features" in str(report)


def test_a_layer_with_one_seed_has_alive_latents_and_says_that_they_are_no_count(stream):
    bank = sf.Bank({("a", 1.0, 0): identity_dictionary(4), ("a", 2.0, 0): identity_dictionary(4)})
    (layer,) = sf.measure(bank, stream, n_tokens=40).layers
    assert layer.n_features["estimate"] == 3
    assert "not a count of features" in layer.n_features["method"]
    assert layer.coverage is None
    assert layer.identifiable is None


def feature_count(hook_name="a", **changes):
    facts = {
        "hook_name": hook_name,
        "n_neurons": 4,
        "estimate": 6.0,
        "low": 5.0,
        "high": 8.0,
        "coverage": 0.97,
        "identifiable": True,
        "reasons": (),
        "load": 0.2,
        "n_tokens": 1000,
        "seeds": (0, 1, 2),
        "steps": (),
        "directions": torch.eye(4),
        "densities": torch.full((4,), 0.1),
    }
    return sf.FeatureCount(**facts | changes)


def test_a_layer_that_was_counted_has_its_count_in_the_report(stream, tmp_path):
    bank = sf.Bank({("a", 1.0, 0): identity_dictionary(4)})
    report = sf.measure(bank, stream, n_tokens=40, counts=[feature_count()])
    (layer,) = report.layers
    assert (layer.n_features["low"], layer.n_features["high"]) == (5.0, 8.0)
    assert layer.features_per_neuron == 1.5
    assert (layer.coverage, layer.load, layer.identifiable) == (0.97, 0.2, True)
    assert "6 features (5 to 8), 1.50 per neuron" in str(report)
    beyond = feature_count(identifiable=False, high=float("inf"))
    folder = sf.measure(bank, stream, n_tokens=40, counts=[beyond]).save(tmp_path / "report")
    text = (folder / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["layers"][0]["n_features"]["high"] is None


def test_counts_of_other_hooks_are_refused(stream):
    bank = sf.Bank({("a", 1.0, 0): identity_dictionary(4)})
    for counts in ([feature_count("b")], [feature_count(), feature_count()]):
        with pytest.raises(ValueError, match="counts must be of hooks of the bank"):
            sf.measure(bank, stream, n_tokens=40, counts=counts)


def test_a_saved_report_loads_equal(report, tmp_path):
    folder = report.save(tmp_path / "report")
    assert (folder / "density.png").read_bytes().startswith(b"\x89PNG")
    json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    loaded = sf.Report.load(folder)
    assert str(loaded) == str(report)
    assert loaded.layers == report.layers
    assert loaded.densities.keys() == report.densities.keys()
    for name, density in report.densities.items():
        assert torch.equal(loaded.densities[name], density)


def test_the_json_has_the_fields_that_other_programs_read(report, tmp_path):
    facts = json.loads((report.save(tmp_path / "report") / "report.json").read_text())
    assert {"saefeat_version", "model", "n_tokens", "rows", "layers"} <= set(facts)
    wanted = """hook_name layer architecture d_in n_neurons d_sae expansion_factor seed l0 n_alive
        dead_fraction features_per_neuron effective_features fvu explained_variance normalized_mse
        ce_loss_recovered density_quantiles"""
    assert set(wanted.split()) <= set(facts["rows"][0])
    wanted = "hook_name n_neurons n_features features_per_neuron coverage load identifiable"
    assert set(wanted.split()) <= set(facts["layers"][0])


def test_a_report_is_never_written_over(report, tmp_path):
    folder = report.save(tmp_path / "report")
    before = (folder / "report.json").read_bytes()
    with pytest.raises(FileExistsError, match="never overwrites"):
        dataclasses.replace(report, n_tokens=7).save(folder)
    assert (folder / "report.json").read_bytes() == before


@pytest.mark.parametrize("damage", ['{"rows": [', "[1, 2]", '{"rows": [{"hook_name": "a"}]}'])
def test_a_damaged_report_is_one_clear_error(report, tmp_path, damage):
    folder = report.save(tmp_path / "report")
    (folder / "report.json").write_text(damage)
    with pytest.raises(ValueError, match=r"report\.json"):
        sf.Report.load(folder)


def test_a_folder_without_a_report_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"report\.json is missing"):
        sf.Report.load(tmp_path)


def test_the_table_has_a_line_for_each_dictionary_and_dashes_for_what_was_not_measured(report):
    lines = str(report).splitlines()
    table = [line for line in lines if line.startswith("a ")]
    assert len(table) == 2
    assert all("–" in line for line in table)  # no model was given


@pytest.fixture(scope="module")
def model():
    return tiny_model("bridge of Llama")


@pytest.fixture(scope="module")
def model_stream(model):
    tokens = sf.load_tokens(token_ids(24, 16), held_out_fraction=0.5)
    return sf.ActivationStream.from_model(model, tokens, hooks=HOOK, batch_size=16)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_an_exact_dictionary_recovers_all_of_the_loss(model, model_stream, ablation):
    bank = sf.Bank({(HOOK, 2.0, 0): signed_dictionary(32, HOOK)})
    report = sf.measure(bank, model_stream, n_tokens=100, model=model, ablation=ablation)
    assert report.rows[0].ce_loss_recovered == pytest.approx(1.0, abs=1e-4)
    assert report.cross_entropy["ablation"] == ablation
    assert "CE rec.: loss recovered from" in str(report)


def test_without_tokens_for_the_loss_a_model_still_says_what_latents_promote(model, model_stream):
    bank = sf.Bank({(HOOK, 2.0, 0): signed_dictionary(32, HOOK)})
    report = sf.measure(bank, model_stream, n_tokens=100, model=model, ce_tokens=0)
    assert report.cross_entropy is None
    assert report.rows[0].ce_loss_recovered is None
    assert all(views.promoted.shape[1] for views in report.views.values())


def test_a_dictionary_that_gives_nothing_recovers_none_of_the_loss(model, model_stream):
    nothing = TopK(sf.TopKConfig(k=1), 32, 32, Origin(hook_name=HOOK))
    report = sf.measure(sf.Bank({(HOOK, 1.0, 0): nothing}), model_stream, n_tokens=100, model=model)
    assert report.rows[0].ce_loss_recovered == pytest.approx(0.0, abs=1e-6)
    assert report.rows[0].n_alive == 0
    assert report.rows[0].density_quantiles == {}


@pytest.mark.parametrize("options", [{"n_tokens": 1}, {"ce_tokens": -1}, {"ablation": "resample"}])
def test_bad_options_are_refused(stream, options):
    bank = sf.Bank({("a", 1.0, 0): identity_dictionary(4)})
    with pytest.raises(ValueError, match="n_tokens must be at least 2"):
        sf.measure(bank, stream, **options)


def test_a_stream_without_the_hook_is_refused(stream):
    bank = sf.Bank({("z", 1.0, 0): identity_dictionary(4, hook_name="z")})
    with pytest.raises(KeyError, match="no hook 'z'"):
        sf.measure(bank, stream)


def test_a_dictionary_of_another_width_is_refused_by_name(stream):
    bank = sf.Bank({("a", 1.0, 0): identity_dictionary(5)})
    with pytest.raises(ValueError, match=r"of a reads \[n, 5\]"):
        sf.measure(bank, stream)


def test_the_loss_needs_tokens(stream):
    bank = sf.Bank({("a", 1.0, 0): identity_dictionary(4)})
    with pytest.raises(ValueError, match="Leave model=None"):
        sf.measure(bank, stream, model=object())


def test_the_layer_is_the_first_number_in_a_hook_name():
    assert layer_number("blocks.13.attn.hook_z") == 13
    assert layer_number("hook_embed") is None
