"""The one product that all dictionaries of a hook share: what it computes, and what it takes."""

import pytest
import torch

import saefeat as sf
from saefeat.dictionaries.registry import dictionary_type
from saefeat.training import shared_scores
from saefeat.training.shared_scores import Scratch, groups


def dictionary(config, d_sae, generator, d_out=None):
    one = dictionary_type(config)(config, 12, d_sae, d_out=d_out)
    sample = torch.randn(50, 12, generator=generator)
    target = sample if d_out is None else sample[:, :d_out]
    one.initialise(generator, torch.randn(one.d_out, generator=generator), sample, target)
    with torch.no_grad():
        one.b_enc.normal_(generator=generator)
    return one


def test_each_dictionary_gets_its_own_scores_whatever_the_centre(generator):
    x = torch.randn(40, 12, generator=generator) + 5
    of_several = [
        dictionary(sf.TopKConfig(k=3), 20, generator),
        dictionary(sf.StandardConfig(), 7, generator),
        dictionary(sf.BatchTopKConfig(k=3), 31, generator, d_out=9),  # a transcoder
    ]
    mean = x.mean(0)
    scratch = Scratch(x.device)
    scores = shared_scores.shared_scores(of_several, x - mean, mean, torch.float32, scratch)
    for one, own in zip(of_several, scores, strict=True):
        torch.testing.assert_close(own, one.scores(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_far_centre_does_not_cost_bfloat16_its_digits(generator):
    """Without the shared centre, rows 1000 from the origin would round to multiples of 4."""
    x = torch.randn(200, 12, generator=generator) + 1000
    one = dictionary(sf.TopKConfig(k=3), 20, generator)
    with torch.no_grad():
        one.b_dec.fill_(1000)
    mean = x.mean(0)
    (scores,) = shared_scores.shared_scores(
        [one], x - mean, mean, torch.bfloat16, Scratch(x.device)
    )
    exact = one.scores(x).detach()
    assert float((scores.float() - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_groups_are_as_large_as_fits_and_no_larger(monkeypatch):
    monkeypatch.setattr(shared_scores, "MOST_SCORES", 1000)
    assert list(groups([40, 40, 40], 10)) == [slice(0, 2), slice(2, 3)]
    assert list(groups([500, 10], 10)) == [slice(0, 1), slice(1, 2)]  # one alone is never refused
    assert list(groups([], 10)) == []


@pytest.mark.parametrize("most", [1, 1 << 29])
def test_a_bank_learns_the_same_in_any_groups(most, monkeypatch, generator):
    x = torch.randn(3_000, 16, generator=generator)
    stream = sf.ActivationStream.from_tensors({"x": x}, batch_size=500)
    options = {"expansion_factors": [1, 2], "seeds": [0, 1], "n_tokens": 4_000, "progress": False}
    expected = sf.train(stream, sf.TopKConfig(k=4), **options)
    monkeypatch.setattr(shared_scores, "MOST_SCORES", most)
    bank = sf.train(stream, sf.TopKConfig(k=4), **options)
    for key, one in bank.items():
        fvus = [
            float(sf.metrics.fraction_variance_unexplained(x, each(x)))
            for each in (one, expected[key])
        ]
        assert fvus[0] == pytest.approx(fvus[1], rel=1e-2)
