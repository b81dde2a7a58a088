"""Damaged stores, checkpoints, runs and reports are refused in one clear sentence, or usable."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from damage import Files, check_refused_or_used, damaged, files_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saefeat as sf
from saefeat.core.files import hash_bytes
from saefeat.job import Job

N_ROWS, N_TOKENS = 60, 44
JOB = {"kind": "topk", "k": 2, "text": "corpus.txt", "expansion_factors": [8], "seeds": [0, 1]}
"""What `saefeat train` would have noted."""


@cache
def stream() -> sf.ActivationStream:
    x = torch.randn(N_ROWS, 4, generator=torch.Generator().manual_seed(0))
    return sf.ActivationStream.from_tensors({"a": x, "b": -x[:, :2]}, batch_size=8)


def train(out: Path, *, steps: int | None = None) -> sf.Bank:
    """Train in `out`, or go on there; to be stopped after some steps."""

    class Stop(sf.Callback):
        def record(self, record: dict[str, object]) -> None:
            if record["step"] == steps:
                raise RuntimeError

    return sf.train(
        stream(),
        sf.TopKConfig(k=2),
        expansion_factors=[2],
        n_tokens=N_TOKENS,
        out=out,
        resume=True,
        checkpoint_every=1,
        keep_last=1,
        log_every=1,
        progress=False,
        check_memory=False,
        callbacks=[Stop()],
        notes={"job": JOB},
    )


def unfinished_run(folder: Path) -> None:
    with pytest.raises(RuntimeError):
        train(folder, steps=2)
    (folder / ".lock").write_text("{}")


def store(folder: Path) -> None:
    sf.cache_activations(
        stream(), folder, 30, held_out_tokens=4, dtype="int8", rows_per_shard=13, progress=False
    )


def report(folder: Path) -> None:
    crosscoder = sf.train(
        stream(),
        sf.CrosscoderConfig(k=2),
        expansion_factors=[2],
        n_tokens=16,
        progress=False,
        check_memory=False,
    )
    dictionaries = sf.train(
        stream(),
        sf.TopKConfig(k=2),
        expansion_factors=[2],
        seeds=[0, 1],
        n_tokens=16,
        progress=False,
        check_memory=False,
    )
    both = sf.Bank({**crosscoder, **dictionaries})
    sf.measure(both, stream(), n_tokens=6, progress=False).save(folder)


def use_run(folder: Path, out: Path) -> None:
    train(folder)


def use_job(folder: Path, out: Path) -> None:
    job = Job.of_run(folder / "config.json")
    assert job.config()


def use_store(folder: Path, out: Path) -> None:
    opened = sf.ActivationStream.from_store(folder, batch_size=8)
    for batch in (*opened, *opened.held_out_batches()):
        assert len(batch["a"]) == len(batch["b"])
    sf.ActivationStore(folder).verify()
    sf.cache_activations(
        stream(), folder, 40, held_out_tokens=5, rows_per_shard=13, resume=True, progress=False
    )


def use_report(folder: Path, out: Path) -> None:
    loaded = sf.Report.load(folder)
    assert str(loaded)
    assert loaded._repr_html_()
    assert json.dumps(loaded.to_dict(), allow_nan=False)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path, Path], None]]] = {
    "run": (unfinished_run, use_run),
    "job": (unfinished_run, use_job),
    "store": (store, use_store),
    "report": (report, use_report),
}


@cache
def files(kind: str) -> Files:
    make, _ = KINDS[kind]
    with TemporaryDirectory() as name:
        make(Path(name) / "made")
        found = files_of(Path(name) / "made")
    if kind == "job":
        return {"config.json": found["config.json"]}
    return {name: data for name, data in found.items() if not name.endswith(".png")}


def rehashed(files: Files) -> Files:
    """With hashes that vouch for the damage, so that what comes after them is tried too."""
    files = dict(files)
    for facts in [name for name in files if name.endswith("checkpoint.json")]:
        try:
            written = json.loads(files[facts])
            hashes = written["blake2b"]
            for name in hashes:
                hashes[name] = hash_bytes(files[str(Path(facts).parent / name)])
            files[facts] = json.dumps(written).encode()
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            pass  # The damage is in the hashes themselves.
    return files


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_damaged_is_used(kind: str) -> None:
    assert check_refused_or_used(files(kind), KINDS[kind][1]) is None


FEW = settings(max_examples=30, deadline=None, derandomize=True)
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def fuzz(kind: str, data: st.DataObject) -> None:
    name, content = data.draw(damaged(files(kind)))
    check_refused_or_used(rehashed({**files(kind), name: content}), KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(data=st.data())
def test_a_damaged_file_is_refused_clearly_or_usable(kind: str, data: st.DataObject) -> None:
    fuzz(kind, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@MANY
@given(data=st.data())
def test_thousands_of_damaged_files_are(kind: str, data: st.DataObject) -> None:
    fuzz(kind, data)
