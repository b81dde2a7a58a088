"""Files that lie about their size, lead elsewhere or hold programs cost nothing but an error."""

import json
import pickle
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saefeat as sf
from saefeat.core.files import read_json, read_tensors
from saefeat.core.folders import LocalFolder
from saefeat.core.locks import WriterLock
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.topk import TopK
from saefeat.exporting import export
from saefeat.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def no_memory_is_taken() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 300_000


def sae_folder(folder: Path, hook_name: str = "a") -> Path:
    dictionary = TopK(sf.TopKConfig(k=2), 4, 8, Origin(hook_name=hook_name, seed=0))
    return dictionary.save(folder)


def safetensors(header: object, body: bytes = bytes(64)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(shape: list[int], n_bytes: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, n_bytes]}


@pytest.mark.parametrize(
    "data",
    [
        safetensors({"W_dec": tensor([10**6, 10**6], 4 * 10**12)}),
        safetensors({"W_dec": tensor([10**6, 10**6], 64)}),
        safetensors({"W_dec": tensor([2**40, 2**40], 0)}),
        safetensors({"W_dec": tensor([-4, -4], 64)}),
        (2**63).to_bytes(8, "little") + bytes(64),
        (10**12).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_header_that_claims_terabytes_is_refused(data: bytes, tmp_path: Path) -> None:
    folder = sae_folder(tmp_path / "sae")
    (folder / "sae_weights.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors is not a whole safetensors"):
        sf.load_dictionary(folder)


def test_a_shape_without_numbers_makes_no_weights_of_the_other_size(tmp_path: Path) -> None:
    folder = sae_folder(tmp_path / "sae")
    empty = {"W_enc": torch.empty(0, 10**13), "W_dec": torch.empty(10**13, 0)}
    save_file(empty, folder / "sae_weights.safetensors")
    facts = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**facts, "d_in": 0, "d_sae": 10**13}))
    with pytest.raises(ValueError, match="do not fit d_in=0"):
        sf.load_dictionary(folder)


def test_json_of_a_terabyte_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "cfg.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes"):
        read_json(tmp_path / "cfg.json")
    (tmp_path / "cfg.json").rename(tmp_path / "index.json")
    with pytest.raises(ValueError, match=r"index\.json is larger than any index"):
        sf.ActivationStore(tmp_path)


def pickled(folder: Path, tensors: object) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    return folder


@pytest.mark.parametrize(
    "one",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.empty(10**6, 10**6, device="meta"),
        torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6), check_invariants=True),
        "text",
        [1, 2],
    ],
    ids=["repeated", "meta", "sparse", "text", "list"],
)
def test_a_pickled_tensor_that_has_no_memory_of_its_own_is_refused(
    one: object, tmp_path: Path
) -> None:
    folder = pickled(tmp_path / "sae", {"encoder.weight": one})
    with pytest.raises(ValueError, match=r"ae\.pt"):
        sf.load_dictionary(folder)


class Program:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writes", ["torch", "torch, as it was", "pickle"])
def test_no_program_in_a_pickle_is_run(writes: str, tmp_path: Path) -> None:
    folder = pickled(tmp_path / "sae", {})
    if writes == "pickle":
        (folder / "ae.pt").write_bytes(pickle.dumps(Program(tmp_path / "ran")))
    else:
        is_new = writes == "torch"
        torch.save(
            Program(tmp_path / "ran"), folder / "ae.pt", _use_new_zipfile_serialization=is_new
        )
    with pytest.raises(ValueError, match=r"ae\.pt is not a file of tensors alone"):
        sf.load_dictionary(folder)
    assert not (tmp_path / "ran").exists()


def test_no_other_module_reads_pickles() -> None:
    source = Path(sf.__file__).parent
    reads = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        for line in path.read_text().splitlines()
        if any(word in line for word in ("pickle.load", "torch.load(", "joblib", "np.load("))
    }
    assert reads == {"dictionaries/peers.py"}


def test_an_npz_that_unpacks_to_more_than_there_is_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("W_enc.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**6)}
            )
        archive.infolist()[0].file_size = 2**45  # in the directory, which is written last
    with pytest.raises(ValueError, match=r"params\.npz is not a whole npz file \(it unpacks to"):
        sf.load_dictionary(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside", "/outside", "..", "a/../../outside", "a\\b", "a\0b"]
)
def test_a_hook_name_leads_out_of_no_folder(name: str, tmp_path: Path) -> None:
    folder = sae_folder(tmp_path / "saes" / "a" / "x2-seed0", name)
    with pytest.raises(ValueError, match="cannot name a folder"):
        export(tmp_path, tmp_path / "out" / "exported", progress=False)
    with pytest.raises(ValueError, match="cannot name a folder"):
        sf.Bank.load(tmp_path).save(tmp_path / "out" / "bank")
    assert {path.name for path in tmp_path.iterdir()} == {"saes"}
    assert sf.load_dictionary(folder).hook_name == name


def test_a_lock_that_is_a_link_writes_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "precious").write_text("data")
    (tmp_path / "folder" / ".lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(OSError, match="symbolic link"),
        WriterLock(LocalFolder(tmp_path / "folder")),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize("is_there", [True, False])
def test_metrics_that_are_a_link_are_replaced(is_there: bool, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    if is_there:
        elsewhere.write_text("data")
    run = RunFolder(tmp_path / "run", {"a": 1}, resume=False)
    run.metrics.symlink_to(elsewhere)
    run.cut_metrics(0)
    run.close()
    assert not run.metrics.is_symlink()
    assert elsewhere.exists() is is_there
    assert not is_there or elsewhere.read_text() == "data"


def test_links_to_a_dictionary_are_followed_as_in_the_cache_of_a_hub(tmp_path: Path) -> None:
    folder = sae_folder(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert sf.load_dictionary(tmp_path / "snapshot").d_sae == 8


def test_tensors_of_a_file_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", Path("/dev/zero")):
        if path.exists() and sys.platform == "linux":
            with pytest.raises((ValueError, FileNotFoundError)):
                read_tensors(path)
