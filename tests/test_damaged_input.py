"""Damaged files are refused in one clear sentence: dictionaries of every format, and reports."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from damage import Files, check_refused_or_used, damaged, files_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import saefeat as sf
from saefeat.dictionaries.base import Dictionary, Origin
from saefeat.dictionaries.registry import dictionary_type
from saefeat.exporting import export

D_IN, D_SAE = 6, 20


def made_by(make: Callable[[Path], object]) -> Files:
    with TemporaryDirectory() as name:
        make(Path(name) / "made")
        return files_of(Path(name) / "made")


def own(config: sf.TopKConfig, origin: Origin) -> Dictionary:
    dictionary = dictionary_type(config)(config, D_IN, D_SAE, origin)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.1)
    return dictionary


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sae_lens(folder: Path, config: dict[str, object]) -> None:
    folder.mkdir()
    save_file(weights(), folder / "sae_weights.safetensors")
    common = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps({**common, **config}))


def sparsify(folder: Path) -> None:
    folder.mkdir()
    named = weights()
    encoder = {"encoder.weight": named["W_enc"].T.contiguous(), "encoder.bias": named["b_enc"]}
    rest = {"W_dec": named["W_dec"], "b_dec": named["b_dec"]}
    save_file({**encoder, **rest}, folder / "sae.safetensors")
    config = {"d_in": D_IN, "k": 3, "activation": "topk", "signed": False, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(config))


def dictionary_learning(folder: Path) -> None:
    folder.mkdir()
    named = weights()
    tensors = {
        "encoder.weight": named["W_enc"].T.contiguous(),
        "encoder.bias": named["b_enc"],
        "decoder.weight": named["W_dec"].T.contiguous(),
        "b_dec": named["b_dec"],
        "k": torch.tensor(3),
        "threshold": torch.tensor(0.5),
        "group_sizes": torch.tensor([5, 15]),
    }
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": "MatryoshkaBatchTopKSAE", "submodule_name": "resid_3", "seed": 1}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


def gemma_scope(folder: Path) -> None:
    folder.mkdir()
    arrays = {name: one.numpy() for name, one in weights().items()}
    np.savez(folder / "params.npz", threshold=np.ones(D_SAE, np.float32), **arrays)


CROSSCODER = Origin(hook_name="both", hook_widths={"a": 2, "b": 4}, expansion_factor=20 / 3, seed=0)
FORMATS: dict[str, Callable[[Path], object]] = {
    "topk": own(sf.TopKConfig(k=3), Origin(hook_name="a", expansion_factor=20 / 6, seed=0)).save,
    "matryoshka": own(sf.MatryoshkaConfig(k=3), Origin(hook_name="a", context_size=8)).save,
    "matching pursuit": own(sf.MatchingPursuitConfig(k=3), Origin(hook_name="a")).save,
    "gated": own(sf.GatedConfig(), Origin(hook_name="a", model_name="tiny")).save,
    "crosscoder": own(sf.CrosscoderConfig(k=3, causal=True), CROSSCODER).save,
    "SAELens 6": partial(
        sae_lens,
        config={
            "architecture": "topk",
            "k": 3,
            "rescale_acts_by_decoder_norm": True,
            "normalize_activations": "none",
            "metadata": {"hook_name": "blocks.2.hook_mlp_out", "context_size": 128},
        },
    ),
    "SAELens 5": partial(
        sae_lens,
        config={
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": 3},
            "hook_name": "blocks.3.hook_resid_pre",
            "prepend_bos": True,
        },
    ),
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "Gemma Scope": gemma_scope,
}


@cache
def files(kind: str) -> Files:
    return made_by(FORMATS[kind])


def use_dictionary(folder: Path, out: Path) -> None:
    """All that reads its files or its numbers."""
    opened = sf.load_dictionary(folder)
    assert opened(torch.ones(3, opened.d_in)).shape == (3, opened.d_out)
    assert repr(opened)
    assert opened._repr_html_()
    (loaded,) = sf.Bank.load(folder).values()
    assert loaded.d_sae == opened.d_sae
    if opened.architecture != "matching_pursuit_refit":  # SAELens has none
        export(folder, out / "exported", progress=False)
    if opened.hook_name:  # Gemma Scope's files name none
        sf.Bank.load(folder).save(out / "bank")


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_not_damaged_is_used(kind: str) -> None:
    assert check_refused_or_used(files(kind), use_dictionary) is None


FEW = settings(max_examples=60, deadline=None, derandomize=True)
MANY = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


def fuzz_a_dictionary(kind: str, data: st.DataObject) -> None:
    name, content = data.draw(damaged(files(kind)))
    check_refused_or_used({**files(kind), name: content}, use_dictionary)


@pytest.mark.parametrize("kind", FORMATS)
@FEW
@given(data=st.data())
def test_a_damaged_dictionary_is_refused_clearly_or_usable(kind: str, data: st.DataObject) -> None:
    fuzz_a_dictionary(kind, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@MANY
@given(data=st.data())
def test_thousands_of_damaged_dictionaries_are(kind: str, data: st.DataObject) -> None:
    fuzz_a_dictionary(kind, data)
