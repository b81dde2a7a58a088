"""Dictionaries on the hub, as huggingface_hub's own client puts them there and gets them back."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from local_hub import LocalHub

import saefeat as sf
from saefeat.dictionaries.base import Dictionary, Origin
from saefeat.dictionaries.batch_topk import BatchTopK
from saefeat.dictionaries.topk import TopK

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def dictionary() -> Dictionary:
    return random_dictionary(TopK, seed=0)


def random_dictionary(kind: type[Dictionary], seed: int) -> Dictionary:
    torch.manual_seed(seed)
    origin = Origin(hook_name=HOOK, expansion_factor=3, seed=seed, model_name="tiny")
    dictionary = kind(kind.config_type(k=4), 8, 24, origin)
    for weight in dictionary.parameters():
        torch.nn.init.normal_(weight)
    return dictionary


def assert_same(one: Dictionary, other: Dictionary) -> None:
    assert (one.origin, one.config, type(one)) == (other.origin, other.config, type(other))
    for name, tensor in one.file_tensors().items():
        assert torch.equal(tensor, other.file_tensors()[name])


def test_what_is_pushed_is_what_save_writes_and_comes_back_the_same(
    hub: LocalHub, dictionary: Dictionary, tmp_path: Path
) -> None:
    url = dictionary.push_to_hub("user/sae", private=True, commit_message="First")
    assert url == f"{hub.url}/user/sae/commit/{hub.commit}"
    assert (hub.made["visibility"], hub.messages) == ("private", ["First"])
    saved = dictionary.save(tmp_path / "saved")
    assert hub.files == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert_same(sf.Dictionary.from_hub("user/sae"), dictionary)


def test_a_bank_comes_back_whole_and_one_of_it_alone(hub: LocalHub) -> None:
    bank = sf.Bank({(HOOK, 3, seed): random_dictionary(BatchTopK, seed) for seed in (0, 1)})
    bank.push_to_hub("user/bank")
    again = sf.Bank.from_hub("user/bank")
    assert list(again) == list(bank)
    for key, one in bank.items():
        assert_same(again[key], one)


def test_sae_lens_opens_one_of_a_pushed_bank(hub: LocalHub) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    dictionary = random_dictionary(BatchTopK, seed=0)
    sf.Bank({(HOOK, 3, 0): dictionary}).push_to_hub("user/bank")
    theirs = sae_lens.SAE.from_pretrained("user/bank", f"{HOOK}/x3-seed0")
    x = torch.randn(20, 8)
    torch.testing.assert_close(theirs(x), dictionary(x), atol=1e-5, rtol=1e-5)


def test_one_folder_of_a_repository_is_fetched_without_the_others(
    hub: LocalHub, dictionary: Dictionary, tmp_path: Path
) -> None:
    other = random_dictionary(BatchTopK, seed=1)
    dictionary.push_to_hub("user/saes", path_in_repo="layers/[1]")
    other.push_to_hub("user/saes", path_in_repo="layers/1")
    assert_same(sf.Dictionary.from_hub("user/saes", path_in_repo="layers/[1]/"), dictionary)
    fetched = {path.parent.name for path in (tmp_path / "cache").rglob("cfg.json")}
    assert fetched == {"[1]"}
    assert_same(
        sf.Dictionary.from_hub("user/saes", path_in_repo="layers/1", revision="main"), other
    )


def test_without_a_connection_the_cache_serves(
    hub: LocalHub, dictionary: Dictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictionary.push_to_hub("user/sae")
    sf.Dictionary.from_hub("user/sae")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(sf.Dictionary.from_hub("user/sae"), dictionary)
    with pytest.raises(FileNotFoundError, match="outgoing traffic has been disabled"):
        sf.Dictionary.from_hub("user/another")


def test_what_is_not_there_is_said(hub: LocalHub, dictionary: Dictionary) -> None:
    dictionary.push_to_hub("user/sae")
    with pytest.raises(FileNotFoundError, match=r"no/such/folder holds no dictionary"):
        sf.Dictionary.from_hub("user/sae", path_in_repo="no/such/folder")
    with pytest.raises(RepositoryNotFoundError):
        sf.Dictionary.from_hub("user/another")
    with torch.no_grad():
        dictionary.b_dec.fill_(float("nan"))
    with pytest.raises(ValueError, match="holds NaN"):
        dictionary.push_to_hub("user/sae")
    assert len(hub.messages) == 1
