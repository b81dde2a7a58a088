"""Dictionaries of other libraries: opened with the outputs that their own formula gives."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import relu

import saefeat as sf
from saefeat.dictionaries.batch_topk import BatchTopK
from saefeat.dictionaries.gated import Gated
from saefeat.dictionaries.jump_relu import JumpReLU
from saefeat.dictionaries.standard import Standard
from saefeat.dictionaries.topk import TopK

D_IN, D_SAE, K = 6, 20, 3


@pytest.fixture
def x(generator):
    return torch.randn(40, D_IN, generator=generator)


@pytest.fixture
def weights(generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "W_enc": draw(D_IN, D_SAE),
        "b_enc": 0.1 * draw(D_SAE),
        "W_dec": draw(D_SAE, D_IN),
        "b_dec": 0.3 * draw(D_IN),
    }


def top(scores, k=K):
    kept = scores.topk(k, dim=1)
    return torch.zeros_like(scores).scatter(1, kept.indices, kept.values.relu())


def check(opened, kind, x, codes, weights):
    assert type(opened) is kind
    torch.testing.assert_close(opened.encode(x).to_dense(), codes, atol=1e-5, rtol=1e-5)
    expected = codes @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(opened(x), expected, atol=1e-5, rtol=1e-5)


def write_sae_lens(folder, tensors, config):
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def config_6(architecture, **more):
    return {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.2.hook_mlp_out", "model_name": "tiny"},
        **more,
    }


def config_5(**more):
    """As SAELens 5 wrote it: every setting at one level, other names."""
    return {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "context_size": 128,
        "model_name": "gpt2-small",
        "hook_name": "blocks.3.hook_resid_pre",
        "hook_layer": 3,
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": "openwebtext",
        "normalize_activations": "none",
        "dtype": "torch.float32",
        "device": "cpu",
        "sae_lens_training_version": None,
        "neuronpedia_id": "gpt2-small/3-res-jb",
        **more,
    }


@pytest.mark.parametrize("applied", [True, False])
def test_sae_lens_6_opens_with_b_dec_taken_from_the_input_or_not(applied, weights, x, tmp_path):
    config = config_6("standard", apply_b_dec_to_input=applied)
    opened = sf.load_dictionary(write_sae_lens(tmp_path / "sae", weights, config))
    centred = x - weights["b_dec"] if applied else x
    codes = relu(centred @ weights["W_enc"] + weights["b_enc"])
    check(opened, Standard, x, codes, weights)
    assert opened.hook_name == "blocks.2.hook_mlp_out"
    assert opened.origin.model_name == "tiny"


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("applied", [True, False])
def test_what_sae_lens_saves_opens_with_its_outputs(architecture, applied, generator, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    more = {"k": K} if architecture == "topk" else {}
    config = config_class(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=applied, **more)
    theirs = sae_class(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).abs())
        theirs.W_enc.sub_(theirs.W_enc.mean())
    theirs.save_model(tmp_path / "sae")
    opened = sf.load_dictionary(tmp_path / "sae")
    with torch.no_grad():
        torch.testing.assert_close(opened.encode(x).to_dense(), theirs.encode(x))
        torch.testing.assert_close(opened(x), theirs(x))
    # And back: what is saved again, SAELens opens with the same outputs.
    again = sae_lens.SAE.load_from_disk(str(opened.save(tmp_path / "again")))
    with torch.no_grad():
        torch.testing.assert_close(again(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_transcoder"])
def test_transcoders_of_sae_lens_open_with_their_outputs(architecture, generator, x, tmp_path):
    pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    theirs = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, d_out=4, apply_b_dec_to_input=False))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.3)
        if architecture == "jumprelu_transcoder":
            theirs.threshold.abs_()
    theirs.save_model(tmp_path / "sae")
    opened = sf.load_dictionary(tmp_path / "sae")
    assert opened.is_transcoder
    assert opened.d_out == 4
    with torch.no_grad():
        torch.testing.assert_close(opened(x), theirs(x))


def test_topk_ranked_by_decoder_norm_is_folded(weights, x, tmp_path):
    config = config_6("topk", k=K, rescale_acts_by_decoder_norm=True)
    opened = sf.load_dictionary(write_sae_lens(tmp_path / "sae", weights, config))
    norms = weights["W_dec"].norm(dim=1)
    scores = ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]) * norms
    expected = (top(scores) / norms) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(opened(x), expected, atol=1e-5, rtol=1e-5)


def test_sae_lens_5_opens_and_topk_hides_in_its_activation(weights, x, tmp_path):
    opened = sf.load_dictionary(write_sae_lens(tmp_path / "relu", weights, config_5()))
    scores = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    check(opened, Standard, x, relu(scores), weights)
    assert opened.hook_name == "blocks.3.hook_resid_pre"
    assert opened.origin.context_size == 128
    config = config_5(activation_fn_str="topk", activation_fn_kwargs={"k": K})
    opened = sf.load_dictionary(write_sae_lens(tmp_path / "topk", weights, config))
    check(opened, TopK, x, top(scores), weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, "'temporal'"),
        ({"architecture": "skip_transcoder"}, "'skip_transcoder'"),
        ({"normalize_activations": "layer_norm"}, "layer_norm.*not folded"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"d_in": 7}, "do not fit d_in=7"),
        ({"d_in": "six"}, "d_in.*should be int, found 'six'"),
        ({"metadata": [1]}, "JSON object"),
    ],
)
def test_what_is_not_known_in_a_sae_lens_folder_is_named(changes, message, weights, tmp_path):
    config = {**config_6("standard"), **changes}
    with pytest.raises(ValueError, match=message):
        sf.load_dictionary(write_sae_lens(tmp_path / "sae", weights, config))


def test_tensors_that_do_not_belong_or_are_missing_are_named(weights, tmp_path):
    more = {**weights, "W_skip": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="W_skip"):
        sf.load_dictionary(write_sae_lens(tmp_path / "more", more, config_6("standard")))
    less = {name: tensor for name, tensor in weights.items() if name != "b_enc"}
    with pytest.raises(ValueError, match="b_enc"):
        sf.load_dictionary(write_sae_lens(tmp_path / "less", less, config_6("standard")))
    bad = {**weights, "b_dec": torch.full((D_IN,), torch.nan)}
    with pytest.raises(ValueError, match="NaN"):
        sf.load_dictionary(write_sae_lens(tmp_path / "bad", bad, config_6("standard")))


def test_weights_in_float64_keep_every_digit(weights, tmp_path):
    wide = {name: tensor.double() / 3 for name, tensor in weights.items()}
    folder = write_sae_lens(tmp_path / "sae", wide, config_6("standard"))
    opened = sf.load_dictionary(folder)
    assert all(torch.equal(opened.file_tensors()[name], wide[name]) for name in wide)


def test_gemma_scope_opens(weights, x, generator, tmp_path):
    threshold = torch.rand(D_SAE, generator=generator)
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    np.savez(tmp_path / "params.npz", threshold=threshold.numpy(), **arrays)
    scores = x @ weights["W_enc"] + weights["b_enc"]
    opened = sf.load_dictionary(tmp_path)
    check(opened, JumpReLU, x, scores * (scores > threshold), weights)


def test_a_damaged_npz_or_one_with_objects_is_refused(weights, tmp_path):
    (tmp_path / "params.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"params\.npz is not a whole npz"):
        sf.load_dictionary(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"params\.npz"):
        sf.load_dictionary(tmp_path)


def test_an_npz_whose_member_has_a_damaged_name_is_refused_briefly(weights, tmp_path):
    path = tmp_path / "params.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in weights.items()})
    damaged = bytearray(path.read_bytes())
    damaged[27] = 4  # the first member's name seems to be 1,024 bytes longer
    path.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"not a whole npz file \(File name in directory"
    ) as caught:
        sf.load_dictionary(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(path))


def write_dictionary_learning(folder, name, tensors, k=None):
    """The layout of its `trainer.save`: weights as `nn.Linear` has them."""
    folder.mkdir()
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": name, "lm_name": "pythia", "submodule_name": "resid_3", "k": k}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


def linear(weights):
    return {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
    }


def test_dictionary_learning_opens_every_kind(weights, x, generator, tmp_path):
    b_dec = weights["b_dec"]
    scores = (x - b_dec) @ weights["W_enc"] + weights["b_enc"]
    tensors = {**linear(weights), "bias": b_dec}
    folder = write_dictionary_learning(tmp_path / "1", "AutoEncoder", tensors)
    check(sf.load_dictionary(folder), Standard, x, relu(scores), weights)
    assert sf.load_dictionary(folder).hook_name == "resid_3"

    settings = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
    tensors = {**linear(weights), "b_dec": b_dec, **settings}
    folder = write_dictionary_learning(tmp_path / "2", "AutoEncoderTopK", tensors, K)
    check(sf.load_dictionary(folder), TopK, x, top(scores), weights)
    folder = write_dictionary_learning(tmp_path / "3", "BatchTopKSAE", tensors, K)
    check(sf.load_dictionary(folder), BatchTopK, x, scores * (scores > 0.7), weights)
    tensors["threshold"] = torch.tensor(-1.0)  # as it starts there
    folder = write_dictionary_learning(tmp_path / "4", "BatchTopKSAE", tensors, K)
    check(sf.load_dictionary(folder), BatchTopK, x, relu(scores), weights)

    groups = {**weights, **settings, "group_sizes": torch.tensor([5, 15])}
    folder = write_dictionary_learning(tmp_path / "5", "MatryoshkaBatchTopKSAE", groups, K)
    opened = sf.load_dictionary(folder)
    assert opened.prefixes == [5, 20]
    torch.testing.assert_close(opened.encode(x).to_dense(), scores * (scores > 0.7))

    threshold = torch.rand(D_SAE, generator=generator)
    folder = write_dictionary_learning(
        tmp_path / "6", "JumpReluAutoEncoder", {**weights, "threshold": threshold}
    )
    raw = x @ weights["W_enc"] + weights["b_enc"]
    check(sf.load_dictionary(folder), JumpReLU, x, raw * (raw > threshold), weights)

    gate, mag, r_mag = torch.randn(3, D_SAE, generator=generator)
    tensors = {name: tensor for name, tensor in linear(weights).items() if "bias" not in name}
    more = {"decoder_bias": b_dec, "gate_bias": gate, "mag_bias": mag, "r_mag": r_mag}
    folder = write_dictionary_learning(tmp_path / "7", "GatedAutoEncoder", {**tensors, **more})
    centred = (x - b_dec) @ weights["W_enc"]
    codes = (centred + gate > 0) * relu(r_mag.exp() * centred + mag)
    check(sf.load_dictionary(folder), Gated, x, codes, weights)


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was run"
    folder = write_dictionary_learning(tmp_path / "sae", "AutoEncoder", {"bias": Payload(marker)})
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        sf.load_dictionary(folder)
    assert not marker.exists()


def test_an_unknown_class_of_dictionary_learning_is_named(weights, tmp_path):
    folder = write_dictionary_learning(tmp_path / "sae", "IdentityDict", weights)
    with pytest.raises(ValueError, match="'IdentityDict'"):
        sf.load_dictionary(folder)


def write_sparsify(folder, weights, **more):
    folder.mkdir()
    config = {"activation": "topk", "expansion_factor": 32, "k": K, "d_in": D_IN, **more}
    (folder / "cfg.json").write_text(json.dumps({"num_latents": D_SAE, **config}))
    names = {name: tensor for name, tensor in linear(weights).items() if "decoder" not in name}
    save_file(
        {**names, "W_dec": weights["W_dec"], "b_dec": weights["b_dec"]}, folder / "sae.safetensors"
    )
    return folder


def test_sparsify_opens(weights, x, tmp_path):
    opened = sf.load_dictionary(write_sparsify(tmp_path / "layers.3", weights))
    scores = relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    check(opened, TopK, x, top(scores), weights)
    transcoder = sf.load_dictionary(write_sparsify(tmp_path / "mlp", weights, transcode=True))
    assert transcoder.is_transcoder
    codes = top(relu(x @ weights["W_enc"] + weights["b_enc"]))
    check(transcoder, TopK, x, codes, weights)


@pytest.mark.parametrize("option", [{"activation": "groupmax"}, {"skip_connection": True}])
def test_what_sparsify_has_and_this_library_has_not_is_named(option, weights, tmp_path):
    with pytest.raises(ValueError, match=next(iter(option))):
        sf.load_dictionary(write_sparsify(tmp_path / "sae", weights, **option))


REGISTRY = """
import saefeat as sf
sae = sf.load_dictionary("gpt2-small-res-jb", sae_id="blocks.0.hook_resid_pre")
print(type(sae).__name__, sae.d_in, sae.d_sae, sae.hook_name)
"""


def test_a_release_of_the_registry_opens_by_its_id(weights, tmp_path):
    """From a hub cache as huggingface_hub lays it out, since no hub is asked here."""
    pytest.importorskip("sae_lens")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = get_pretrained_saes_directory()["gpt2-small-res-jb"]
    commit = "0" * 40
    repository = tmp_path / f"models--{release.repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit / release.saes_map["blocks.0.hook_resid_pre"]
    folder.parent.mkdir(parents=True)
    write_sae_lens(folder, weights, config_5(hook_name="blocks.0.hook_resid_pre"))
    finished = subprocess.run(
        [sys.executable, "-c", REGISTRY],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "Standard 6 20 blocks.0.hook_resid_pre"


def test_a_folder_with_no_dictionary_says_what_it_would_take(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ae\.pt"):
        sf.load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no weights beside it"):
        sf.load_dictionary(tmp_path)


def test_a_loaded_dictionary_can_be_measured_trained_further_and_saved(weights, tmp_path):
    weights["W_dec"] *= 3  # rows of any length, as SAELens trains them
    folder = write_sae_lens(tmp_path / "sae", weights, config_6("standard"))
    hook = "blocks.2.hook_mlp_out"
    bank = sf.Bank({(hook, D_SAE / D_IN, 0): sf.load_dictionary(folder)})
    x = torch.randn(4_000, D_IN, generator=torch.Generator().manual_seed(1)).abs()
    stream = sf.ActivationStream.from_tensors({hook: x}, batch_size=200)
    before = sf.measure(bank, stream, progress=False).rows[0]
    further = sf.train(stream, bank, n_tokens=20_000, progress=False)
    after = sf.measure(further, stream, progress=False).rows[0]
    assert after.fvu < 0.5 * before.fvu
    further.save(tmp_path / "further")
    loaded = sf.Bank.load(tmp_path / "further")[hook, D_SAE / D_IN, 0]
    assert torch.equal(loaded(x), further[hook, D_SAE / D_IN, 0](x))


def test_thresholds_that_differ_are_not_read_as_the_one_of_batch_topk(weights, tmp_path):
    """As where SAELens trained the JumpReLU that it takes the folder for, and saved over it."""
    saved = BatchTopK(sf.BatchTopKConfig(k=K), D_IN, D_SAE).save(tmp_path / "sae")
    tensors = {**weights, "threshold": torch.linspace(0.5, 2, D_SAE)}
    save_file(tensors, saved / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"one threshold, and its file has from 0\.5 to 2"):
        sf.load_dictionary(saved)


def test_an_array_header_that_claims_terabytes_is_refused(tmp_path):
    """An array whose header claims far more than the file holds."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    magic = b"\x93NUMPY\x01\x00" + len(header + b"\n").to_bytes(2, "little")
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", magic + header + b"\n")
    with pytest.raises(ValueError, match=r"params\.npz"):
        sf.load_dictionary(tmp_path)
