"""How settings of a count are chosen, on agreements made by hand."""

import math
from dataclasses import replace

import pytest
import torch

import saefeat as sf
from saefeat.superposition.counting.agreement import Agreement
from saefeat.superposition.counting.conclusion import conclude
from saefeat.superposition.counting.feature_count import Step
from saefeat.superposition.counting.layer_rows import LayerRows
from saefeat.superposition.counting.search import choose, with_room


def found(d_sae=64, picks=2, n_features=10, n_strict=None, shared_energy=0.95, alone=0, rows=1000):
    directions = torch.nn.functional.normalize(
        torch.randn(n_features, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    return Agreement(
        d_sae=d_sae,
        picks=picks,
        n_rows=rows,
        directions=directions,
        offset=torch.zeros(8),
        found_in=torch.tensor([3] * n_features + [1] * alone, dtype=torch.int64),
        n_seeds=3,
        n_strict=n_features if n_strict is None else n_strict,
        n_combined=0,
        shared_energy=shared_energy,
        fvu=0.1,
    )


class Layer:
    """Answers for each width and number of picks, and what was asked."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def compare(self, d_sae, picks, n_seeds, n_rows):
        self.asked.append((d_sae, picks))
        answer = self.answers.get((d_sae, picks), {"n_features": 0, "shared_energy": 0.0})
        return found(d_sae=d_sae, picks=picks, rows=n_rows, **answer)


def test_picks_are_those_on_which_starts_agree_best_and_no_more_are_tried_once_they_fail():
    shares = {1: 0.7, 2: 0.9, 4: 0.95, 8: 0.3, 16: 0.99}
    layer = Layer({(32, picks): {"shared_energy": share} for picks, share in shares.items()})
    probes, best = choose(layer.compare, [1, 2, 4, 8, 16], [32], 1000)
    assert best.picks == 4
    assert [picks for _, picks in layer.asked] == [1, 2, 4, 8]
    assert len(probes) == 4


def test_a_width_with_room_ends_the_search():
    layer = Layer({(d_sae, 1): {"n_features": 20} for d_sae in (16, 32, 64)})
    choose(layer.compare, [1], [16, 32, 64], 1000)
    assert [d_sae for d_sae, _ in layer.asked] == [16, 32]


def test_a_narrow_dictionary_that_agrees_better_on_fewer_features_is_not_chosen():
    layer = Layer(
        {
            (32, 1): {"n_features": 20, "alone": 30, "shared_energy": 0.95},
            (64, 1): {"n_features": 40, "alone": 30, "shared_energy": 0.7},
        }
    )
    _, best = choose(layer.compare, [1], [32, 64], 1000)
    assert best.d_sae == 64


def test_the_search_ends_where_wider_dictionaries_agree_on_nothing_more():
    layer = Layer({(d_sae, 1): {"alone": 90, "shared_energy": 0.1} for d_sae in (16, 32, 64, 128)})
    choose(layer.compare, [1], [16, 32, 64, 128], 1000)
    assert [d_sae for d_sae, _ in layer.asked] == [16, 32, 64]


def test_the_last_width_grows_until_the_features_have_room():
    layer = Layer({(16, 2): {"n_features": 15}, (24, 2): {"n_features": 18}})
    tried = with_room(layer.compare, found(n_features=10, picks=2), 100, 3, 1000)
    assert [(one.d_sae, one.picks) for one in tried] == [(16, 2), (16, 3), (24, 2), (24, 3)]


def test_the_last_width_is_no_wider_than_what_was_allowed():
    layer = Layer({(32, picks): {"n_features": 32} for picks in (2, 3)})
    tried = with_room(layer.compare, found(n_features=32, picks=2), 32, 3, 1000)
    assert [one.d_sae for one in tried] == [32, 32]


@pytest.fixture
def rows():
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    return LayerRows(sf.ActivationStream.from_tensors({"a": x}, batch_size=50), ["a"])


def concluded(rows, last, half=None, others=()):
    half = half or last
    steps = [Step.of("width", one) for one in others] + [Step.of("whole", last)]
    return conclude(rows, last, half, tuple(steps), (0, 1, 2))


def test_what_all_starts_share_has_a_narrow_interval(rows):
    count = concluded(rows, found(n_features=10))
    assert (count.estimate, count.low, count.high) == pytest.approx((10, 9.8, 10.2))
    assert count.identifiable
    assert count.reasons == ()


def test_what_some_starts_have_found_loosely_may_be_nothing_or_as_much_again(rows):
    count = concluded(rows, found(n_features=30, n_strict=27))
    assert (count.estimate, count.low, count.high) == pytest.approx((30, 26.4, 33.6))


def test_what_only_one_start_has_found_tells_of_what_none_has(rows):
    last = found(alone=2)
    assert last.coverage == pytest.approx(1 - 2 / 32)
    assert concluded(rows, last).high == pytest.approx(last.chao2 + 0.2)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (found(shared_energy=0.6), "of the energy of the codes came back"),
        (found(alone=10), "Coverage 0.75 is below"),
        (found(d_sae=11), "fill 11 atoms"),
        (found(n_strict=7), "Only 7 of 10 features are in all starts"),
    ],
)
def test_what_starts_do_not_share_is_no_count(rows, last, reason):
    count = concluded(rows, last)
    assert not count.identifiable
    assert any(reason in one for one in count.reasons)
    assert count.high == math.inf
    assert count.estimate == count.low == pytest.approx(0.98 * last.n_strict)


def test_a_count_below_what_another_width_agreed_on_is_no_count(rows):
    count = concluded(rows, found(n_features=10), others=[found(n_features=14)])
    assert not count.identifiable
    assert "has not settled" in count.reasons[0]
    # A few more are within what the interval can say.
    few = concluded(rows, found(n_features=48), others=[found(n_features=50)])
    assert (few.estimate, few.high) == (48, 50)
    # Fewer picks leave more sums, which starts agree on too.
    assert concluded(rows, found(), others=[found(n_features=14, picks=1)]).identifiable


def test_an_interval_that_does_not_say_how_many_is_no_count(rows):
    last, half = found(n_features=10, n_strict=8), found(n_features=7)
    count = concluded(rows, last, half=half)
    assert (count.identifiable, count.high) == (False, math.inf)
    assert count.estimate == count.low == pytest.approx(7.8)
    assert "too wide to say how many" in count.reasons[-1]
    assert concluded(rows, found(n_features=10), half=half).identifiable


def test_a_count_without_a_longer_fit_shows_the_width_that_it_was_read_off(rows):
    layer = Layer(
        {
            (16, 1): {"n_features": 15, "shared_energy": 0.05},
            (32, 1): {"n_features": 3, "shared_energy": 0.06},
        }
    )
    probes, best = choose(layer.compare, [1], [16, 32], 1000)
    steps = tuple(Step.of("width", one) for one in probes)
    count = conclude(rows, best, None, steps, (0, 1, 2))
    assert count.last_step == Step.of("width", best) != count.steps[-1]
    assert "16 atoms, 1 picks a row" in str(count)
    assert "5.0% of the energy" in str(count)


def test_a_rising_count_is_extrapolated_no_further_than_what_is_unseen(rows):
    rising = concluded(rows, found(n_features=10), half=found(n_features=6))
    assert rising.estimate == 10
    assert rising.high == pytest.approx(14.2)
    assert "still rises" in rising.reasons[0]
    last = found(n_features=30, alone=2)
    unseen = concluded(rows, last, half=found(n_features=26))
    assert unseen.estimate == pytest.approx(min(32, last.chao2))
    # What starts miss, and what more rows would bring.
    assert unseen.high == pytest.approx(last.chao2 + 4 + 0.6)
    settled = concluded(rows, replace(last), half=found(n_features=30))
    assert settled.estimate == 30
