"""The page of a report: what is collected for it, what is in it, its size, and its files."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
from fnmatch import fnmatch
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic_reports import HOSTILE, layer, synthetic_report
from tiny_models import save_tiny_llama, tiny_model

import saefeat as sf
from saefeat.core.files import write_json
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.topk import TopK
from saefeat.metrics.contexts import NO_TOKEN, TopContexts
from saefeat.metrics.unembedding import promoted_tokens, reaches_unembedding
from saefeat.report.collect import MOST_VIEWS, ViewCollector
from saefeat.report.compare import read_reports
from saefeat.report.feature_views import BINS_PER_OCTAVE, LOWEST_LOG2, N_BINS
from saefeat.report.page.render import render
from saefeat.report.page.summary import conclusions

HOOK = "blocks.1.hook_resid_post"


class Page(HTMLParser):
    """Tags of a page, and the texts of its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self):
        (text,) = (text for tag, text in self.texts if tag == "script" and text.startswith("{"))
        return json.loads(text, parse_constant=pytest.fail)


def brute_force_contexts(acts, ids, positions, k, before, after):
    """[(peak, tokens, activations)] of each latent, by looking at every context on its own."""
    starts = [0, *[i for i in range(1, len(ids)) if positions[i] <= positions[i - 1]], len(ids)]
    found = []
    for latent in range(acts.shape[1]):
        ranked = []
        for first, stop in pairwise(starts):
            inside = range(first, stop)
            at = {int(positions[i]): (int(ids[i]), float(acts[i, latent])) for i in inside}
            peak = max(at, key=lambda p: (at[p][1], -p))
            window = [at.get(p, (NO_TOKEN, 0.0)) for p in range(peak - before, peak + after + 1)]
            if at[peak][1] > 0:
                ranked.append((at[peak][1], [t for t, _ in window], [a for _, a in window]))
        found.append(sorted(ranked, reverse=True)[:k])
    return found


@pytest.mark.parametrize("batch_rows", [1, 7, 64, 1000])
def test_the_top_contexts_are_those_of_a_search_whatever_the_batches(batch_rows, generator):
    lengths = torch.randint(1, 12, (40,), generator=generator).tolist()
    # Positions are left out here and there, as attention sinks are.
    kept = [torch.rand(12, generator=generator) < 0.8 for _ in lengths]
    parts = [torch.arange(12)[keep][:length] for keep, length in zip(kept, lengths, strict=True)]
    parts = [torch.tensor([0, *part[part > 0].tolist()]) for part in parts]
    positions = torch.cat(parts)
    n = len(positions)
    ids = torch.randint(0, 99, (n,), generator=generator)
    acts = torch.rand(n, 6, generator=generator) * (torch.rand(n, 6, generator=generator) < 0.2)
    acts[:, 5] = 0  # never fires
    acts[:, 4] = 0
    acts[0, 4] = 1  # in one context alone
    contexts = TopContexts(6, n_contexts=3, before=4, after=2)
    for rows in torch.arange(n).split(batch_rows):
        contexts.update(acts[rows], ids[rows], positions[rows])
    contexts.finish()
    expected = brute_force_contexts(acts, ids, positions, 3, 4, 2)
    assert [len(one) for one in expected][4:] == [1, 0]
    for latent, found in enumerate(expected):
        for place, (_, tokens, activations) in enumerate(found):
            assert contexts.tokens[place, latent].tolist() == tokens
            assert contexts.activations[place, latent].tolist() == pytest.approx(activations)
        assert (contexts.tokens[len(found) :, latent] == NO_TOKEN).all()
        assert (contexts.activations[len(found) :, latent] == 0).all()


@pytest.mark.parametrize("kind", ["HookedTransformer", "bridge of Llama", "bridge of GPT-2"])
def test_promoted_tokens_are_those_that_a_step_in_the_direction_raises(kind):
    model = tiny_model(kind)
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    assert reaches_unembedding(model, "blocks.2.hook_resid_post", 32)
    ids, logits = promoted_tokens(model, directions, 4)
    # With the direction alone in the residual stream, and the biases taken away.
    with torch.no_grad():
        far = 1e3 * directions[None]
        step = (model.unembed(model.ln_final(far)) - model.unembed(model.ln_final(-far)))[0] / 2
    best = step.topk(4, dim=1)
    assert ids.tolist() == best.indices.tolist()
    torch.testing.assert_close(logits, best.values, rtol=1e-3, atol=1e-4)


def test_nothing_is_promoted_where_a_hook_does_not_reach_the_unembedding():
    llama = tiny_model("bridge of Llama")
    assert not reaches_unembedding(llama, "blocks.1.mlp.hook_post", 64)
    assert not reaches_unembedding(llama, HOOK, 31)
    for encoder in ("HookedEncoder", "bridge of BERT"):
        assert not reaches_unembedding(tiny_model(encoder), HOOK, 32)


def test_features_are_shown_at_even_ranks_of_density_with_all_that_they_did(generator):
    d_sae = 400
    sae = TopK(sf.TopKConfig(k=20), 16, d_sae, Origin(hook_name="a"))
    for weight in (sae.encoder, sae.W_dec):
        weight.data.copy_(torch.randn(weight.shape, generator=generator))
    x = 20 * torch.randn(500, 16, generator=generator)
    stream = sf.ActivationStream.from_tensors({"a": x}, batch_size=37, held_out_fraction=0.5)
    bank = sf.Bank({("a", 25.0, 0): sae})
    report = sf.measure(bank, stream, features=10, progress=False)
    shown = report.views["a/x25-seed0"]
    dense = sae.encode(torch.cat([batch["a"] for batch in stream.held_out_batches()])).to_dense()
    followed = torch.arange(40) * 10
    density = (dense > 0).float().mean(0)
    fired = sorted((d for d in density[followed].tolist() if d > 0), reverse=True)
    ranks = torch.linspace(0, len(fired) - 1, 10).round().int().tolist()
    assert len(shown.latents.unique()) == 10
    assert shown.densities.tolist() == pytest.approx([fired[rank] for rank in ranks])
    own = dense[:, shown.latents]
    torch.testing.assert_close(shown.highest, own.amax(0))
    torch.testing.assert_close(shown.means, own.sum(0) / (own > 0).sum(0))
    for latent, counts in zip(own.T, shown.histogram, strict=True):
        edges = 2 ** (LOWEST_LOG2 + torch.arange(N_BINS + 1) / BINS_PER_OCTAVE)
        assert counts.tolist() == torch.histogram(latent[latent > 0], edges).hist.tolist()
    assert shown.tokens.shape == (0, 10, 0)  # tensors have no tokens
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = (unit[shown.latents] @ unit.T).scatter(1, shown.latents[:, None].long(), -2)
    torch.testing.assert_close(shown.cosines, cosines.topk(5, dim=1).values)
    assert shown.neighbours.tolist() == cosines.topk(5, dim=1).indices.tolist()


def test_many_dictionaries_share_what_a_page_can_hold(generator, monkeypatch):
    monkeypatch.setattr("saefeat.report.measure.MOST_VIEWS", 7)
    x = torch.randn(60, 4, generator=generator)
    stream = sf.ActivationStream.from_tensors({"a": x}, batch_size=30, held_out_fraction=0.5)
    sae = TopK(sf.TopKConfig(k=1), 4, 4, Origin(hook_name="a"))
    sae.encoder.data.copy_(torch.eye(4))
    bank = sf.Bank({("a", 1.0, seed): sae for seed in range(3)})
    report = sf.measure(bank, stream, progress=False)
    assert {len(views.latents) for views in report.views.values()} == {2}
    assert sf.measure(sf.Bank({("a", 1.0, 0): sae}), stream, features=0).views == {}
    with pytest.raises(ValueError, match="features at least 0"):
        sf.measure(bank, stream, features=-1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A bank of random latents at a tiny model's residual stream, and its report."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_llama(folder)
    model = sf.load_model(folder, dtype="float32")
    texts = [" ".join(f"w{3 + (i * i + n * i) % 47}" for i in range(60)) for n in range(30)]
    tokens = sf.load_tokens(texts, model.tokenizer, context_size=16, held_out_fraction=0.5)
    stream = sf.ActivationStream.from_model(model, tokens, hooks=HOOK, batch_size=50)
    sae = TopK(sf.TopKConfig(k=4), 32, 64, Origin(hook_name=HOOK))
    generator = torch.Generator().manual_seed(0)
    for weight in (sae.encoder, sae.W_dec):
        weight.data.copy_(torch.randn(weight.shape, generator=generator))
    report = sf.measure(sf.Bank({(HOOK, 2.0, 0): sae}), stream, model=model, ce_tokens=32)
    return model, stream, sae, report


def test_contexts_are_those_of_the_text_with_the_activations_of_the_dictionary(measured):
    model, stream, sae, report = measured
    views = report.views[f"{HOOK}/x2-seed0"]
    held_out = stream.held_out_tokens
    acts = sf.read_activations(model, held_out.ids, hooks=HOOK)[HOOK]
    dense = sae.encode(acts).to_dense().view(*held_out.ids.shape, -1)
    dense[~held_out.counts] = 0
    ids = torch.where(held_out.counts, held_out.ids, NO_TOKEN)
    for i, latent in enumerate(views.latents.tolist()):
        peaks, at = dense[:, :, latent].max(1)
        # Contexts that begin alike have activations alike, and any of them may come first.
        best = (peaks > peaks.max() * (1 - 1e-5)).nonzero().squeeze(1).tolist()
        padded = torch.nn.functional.pad(ids, (16, 8), value=NO_TOKEN)
        windows = [padded[context, at[context] : at[context] + 25].tolist() for context in best]
        assert views.tokens[0, i].tolist() in windows
        highest = peaks.sort(descending=True).values[:5]
        torch.testing.assert_close(views.activations[:, i, 16], highest, rtol=1e-4, atol=1e-5)
    assert report.token_texts[10] == "w10"
    assert views.promoted.tolist() == promoted_tokens(model, sae.W_dec[views.latents])[0].tolist()


def test_a_saved_report_has_a_page_that_is_made_again_from_its_files_alone(measured, tmp_path):
    report = measured[3]
    folder = report.save(tmp_path / "report")
    html = (folder / "report.html").read_text()
    assert "w10" in Page(html).data["vocabulary"]
    loaded = sf.Report.load(folder)
    for name, value in report.views.items():
        for field in dataclasses.fields(value):
            theirs = getattr(loaded.views[name], field.name)
            assert torch.equal(theirs, getattr(value, field.name))
    assert loaded.token_texts == report.token_texts
    (folder / "report.html").unlink()
    read_reports([folder], page=True)
    assert (folder / "report.html").read_text() == html


def test_a_report_of_before_pages_still_loads(measured, tmp_path):
    folder = measured[3].save(tmp_path / "report")
    facts = json.loads((folder / "report.json").read_text())
    del facts["n_shown"]
    write_json(folder / "report.json", facts)
    assert "No single latents were collected" in render(sf.Report.load(folder))


@pytest.fixture(scope="module")
def hostile():
    return synthetic_report(
        ["blocks.0.hook_out", "blocks.1.hook_out", "blocks.2.hook_out</script><b>"],
        n_shown=4,
        n_words=40,
        certainties=("counted", "bounded", "alive"),
    )


def test_text_from_outside_is_data_and_never_markup(hostile):
    html = render(hostile)
    page = Page(html)
    assert len(page.all("script")) == 4
    assert not page.all("img")
    assert not page.all("b")
    assert "\u2028" not in html
    used = [text for text in page.data["vocabulary"] if text in HOSTILE]
    assert HOSTILE[0] in used
    assert "model </title><script>alert(2)</script>" in "".join(text for _, text in page.texts)


def test_the_policy_allows_the_scripts_and_styles_of_the_page_and_nothing_else(hostile):
    html = render(hostile)
    page = Page(html)
    (policy,) = (
        meta["content"]
        for meta in page.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        texts = [text for name, text in page.texts if name == tag and not text.startswith("{")]
        own = [text for text in texts if text.strip()]
        for text in own:
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
        assert policy.count("sha256-") == 4
        assert own
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}
    assert not [attributes for _, attributes in page.tags if "src" in attributes]


def test_thirty_layers_take_less_than_ten_megabytes():
    report = synthetic_report([f"blocks.{i}.hook_resid_post" for i in range(30)])
    assert sum(len(views.latents) for views in report.views.values()) == MOST_VIEWS
    assert len(render(report).encode()) < 10e6


def test_the_summary_says_how_many_where_and_how_sure(hostile):
    counted, bounded, alive = conclusions(hostile)
    assert counted.startswith("blocks.0.hook_out holds 2.50 (2.40 to 2.70) features per neuron")
    assert "1 layer is known to a lower bound only" in bounded
    assert "at least 2.50" in bounded
    assert "not counted" in alive
    assert "--counts 300000" in alive
    other = dataclasses.replace(layer("b", "counted"), features_per_neuron=3.0)
    more = dataclasses.replace(hostile, layers=[layer("a", "counted"), other])
    assert conclusions(more)[0].startswith("b holds 3.00 (2.40 to 2.70) features per neuron, the m")


@pytest.fixture(scope="module")
def saved(hostile, tmp_path_factory):
    return hostile.save(tmp_path_factory.mktemp("saved") / "report")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "report")


def damage_tensors(folder, change):
    tensors = load_file(folder / "feature_views.safetensors")
    change(tensors)
    save_file(tensors, folder / "feature_views.safetensors")


FIRST = "blocks.0.hook_out/x4-seed0"
DAMAGES = {
    "a tensor is missing": lambda t: t.pop(f"{FIRST}/latents"),
    "another dictionary": lambda t: t.update({"b/x1-seed0/latents": t[f"{FIRST}/latents"].clone()}),
    "another shape": lambda t: t.update({f"{FIRST}/means": torch.zeros(3)}),
    "another dtype": lambda t: t.update({f"{FIRST}/means": torch.zeros(4, dtype=torch.int32)}),
    "NaN": lambda t: t[f"{FIRST}/cosines"].fill_(float("nan")),
    "a latent that is not there": lambda t: t[f"{FIRST}/latents"].fill_(4608),
    "no highest activation": lambda t: t[f"{FIRST}/highest"].zero_(),
    "a negative token": lambda t: t[f"{FIRST}/promoted"].fill_(-1),
    "a flat tensor of tokens": lambda t: t.update({f"{FIRST}/tokens": torch.zeros(4).int()}),
    "a lone number": lambda t: t.update({f"{FIRST}/promoted": torch.tensor(1).int()}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_tensors_are_one_clear_error(folder, damage):
    damage_tensors(folder, damage)
    with pytest.raises(ValueError, match=r"feature_views\.safetensors"):
        sf.Report.load(folder)


@pytest.mark.parametrize("name", ["feature_views.safetensors", "tokens.json"])
def test_a_file_that_is_missing_or_cut_off_is_one_clear_error(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        sf.Report.load(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        sf.Report.load(folder)


@pytest.mark.parametrize("texts", [[], {"1": 2}, {"one": "a"}])
def test_texts_of_another_form_are_one_clear_error(folder, texts):
    write_json(folder / "tokens.json", texts)
    with pytest.raises(ValueError, match=r"tokens\.json is damaged"):
        sf.Report.load(folder)


def test_the_followed_latents_are_spread_over_the_dictionary():
    sae = TopK(sf.TopKConfig(k=1), 4, 1000, Origin(hook_name="a"))
    assert ViewCollector(sae, 5, has_tokens=False).followed.tolist() == list(range(0, 1000, 50))
    assert len(ViewCollector(sae, 300, has_tokens=False).followed) == 1000


def test_what_the_page_is_made_of_is_in_the_wheel():
    tomllib = pytest.importorskip("tomllib")
    root = Path(sf.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["saefeat"]
    others = [p for p in root.rglob("*") if p.suffix in (".html", ".css", ".js", ".typed")]
    assert len(others) >= 6
    for path in others:
        name = path.relative_to(root).as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), name
