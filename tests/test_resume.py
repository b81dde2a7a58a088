"""A run that is stopped in any way goes on to the very weights that it would have ended with."""

import errno
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from resumable_run import CONFIGS, N_STEPS, make_stream, run

import saefeat as sf
from saefeat.core import files
from saefeat.training.bank_learner import BankLearner
from saefeat.training.interruption import RunInterrupted

SCRIPT = Path(__file__).parent / "resumable_run.py"


def assert_same(bank, expected):
    assert set(bank) == set(expected)
    for key, one in expected.items():
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, bank[key].state_dict()[name]), (key, name)


class CrashError(RuntimeError):
    pass


@pytest.fixture
def crash_at(monkeypatch):
    """Makes the training step with a number fail, once."""

    def arm(number):
        plain = BankLearner.step

        def step(self, *batch):
            if self.step_number == number:
                monkeypatch.setattr(BankLearner, "step", plain)
                raise CrashError
            return plain(self, *batch)

        monkeypatch.setattr(BankLearner, "step", step)

    return arm


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_kind_goes_on_to_the_same_weights(architecture, crash_at, tmp_path):
    stream = make_stream("tensors", 0)
    expected = run(None, stream, architecture)
    for number in (3, 11):  # within the first epoch, and in the second
        crash_at(number)
        with pytest.raises(CrashError):
            run(tmp_path / "run", stream, architecture)
    assert not (tmp_path / "run" / "saes").exists()
    assert_same(run(tmp_path / "run", stream, architecture), expected)
    expected.save(tmp_path / "expected")
    assert_same(sf.Bank.load(tmp_path / "run"), sf.Bank.load(tmp_path / "expected"))
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
    assert set(steps) == set(range(1, N_STEPS + 1))
    assert len(steps) == N_STEPS * len(expected)  # none twice


@pytest.mark.parametrize("source", ["live", "store"])
def test_every_stream_goes_on_with_the_same_batches(source, crash_at, tmp_path):
    if source == "store":
        sf.cache_activations(make_stream("live", 0), tmp_path / "store", progress=False)
    stream = make_stream(source, 0, tmp_path / "store")
    expected = run(None, stream, "topk")
    left_out = stream.left_out
    for number in (3, 8, 17):
        crash_at(number)
        with pytest.raises(CrashError):
            run(tmp_path / "run", make_stream(source, 0, tmp_path / "store"), "topk")
    again = make_stream(source, 0, tmp_path / "store")
    assert_same(run(tmp_path / "run", again, "topk"), expected)
    assert again.left_out == left_out
    assert again.epochs_started == stream.epochs_started > 1


def test_a_finished_run_is_handed_out_and_a_run_that_never_began_is_begun(tmp_path):
    stream = make_stream("tensors", 0)
    bank = run(tmp_path / "run", stream, "topk")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert_same(run(tmp_path / "run", stream, "topk"), bank)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_checkpoints_are_few_and_usable_models(crash_at, tmp_path):
    stream = make_stream("tensors", 0)
    crash_at(9)
    with pytest.raises(CrashError):
        run(tmp_path / "run", stream, "batch_topk")
    paths = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in paths] == ["step-000000006", "step-000000008"]
    sae = sf.load_dictionary(paths[-1] / "saes" / "b" / "x2-seed1")
    assert sae.origin.n_tokens == 800
    # Its scale is folded in: as good on the model's own activations as a bank of 8 steps.
    x = next(stream.held_out_batches(90))["b"]
    fvu = float(sf.metrics.fraction_variance_unexplained(x, sae(x)))
    assert fvu < 1
    assert set(sf.Bank.load(paths[-1])) == {(h, 2, s) for h in ("a", "b") for s in (0, 1)}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(crash_at, tmp_path, caplog):
    stream = make_stream("tensors", 0)
    expected = run(None, stream, "topk")
    crash_at(9)
    with pytest.raises(CrashError):
        run(tmp_path / "run", stream, "topk")
    newest = tmp_path / "run" / "checkpoints" / "step-000000008" / "training.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert_same(run(tmp_path / "run", stream, "topk"), expected)
    assert "step-000000008 is damaged (training.safetensors is not as it was" in caplog.text


def test_where_every_checkpoint_is_damaged_nothing_is_trained(crash_at, tmp_path):
    stream = make_stream("tensors", 0)
    crash_at(9)
    with pytest.raises(CrashError):
        run(tmp_path / "run", stream, "topk")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "stream.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step-000000008 is damaged: stream.safetensors is missi"):
        run(tmp_path / "run", stream, "topk")


def test_a_run_that_was_asked_for_something_else_is_not_gone_on_with(tmp_path):
    run(tmp_path / "run", make_stream("tensors", 0), "topk")
    with pytest.raises(ValueError, match="its dictionaries is"):
        run(tmp_path / "run", make_stream("tensors", 0), "batch_topk")
    with pytest.raises(ValueError, match="its stream_seed is 0, and 1 was asked"):
        run(tmp_path / "run", make_stream("tensors", 1), "topk")


def test_other_rows_under_the_same_names_are_another_stream(tmp_path):
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    streams = [
        sf.ActivationStream.from_tensors({"x": x * scale}, batch_size=50) for scale in (1, 2)
    ]
    options = {"n_tokens": 300, "out": tmp_path / "run", "progress": False, "resume": True}
    sf.train(streams[0], sf.TopKConfig(k=2), **options)
    with pytest.raises(ValueError, match="its stream is"):
        sf.train(streams[1], sf.TopKConfig(k=2), **options)


def test_resume_needs_a_folder_and_leaves_one_that_is_no_run_alone(tmp_path):
    stream = make_stream("tensors", 0)
    with pytest.raises(ValueError, match="needs out"):
        sf.train(stream, sf.TopKConfig(k=2), n_tokens=100, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds files"):
        run(tmp_path, stream, "topk")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


FAULTS = {
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "no permission": PermissionError(errno.EACCES, "Permission denied"),
}
WRITES = [
    (files.os, "fsync"),
    (files, "save_file"),
    (Path, "write_bytes"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "mkdir"),
]
"""All calls by which a run changes the disk."""


@pytest.fixture
def fail_at(monkeypatch):
    """Makes the write with a number fail, bytes half written; 0 for none. Counts them."""

    def arm(number, fault=None):
        monkeypatch.undo()
        calls = {"n": 0}
        for owner, name in WRITES:
            plain = getattr(owner, name)

            def write(*arguments, _plain=plain, _name=name, **options):
                calls["n"] += 1
                if calls["n"] != number:
                    return _plain(*arguments, **options)
                if _name == "write_bytes":
                    _plain(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise fault

            monkeypatch.setattr(owner, name, write)
        return calls

    return arm


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_whose_disk_fails_at_any_write_goes_on_afterwards(fault, fail_at, tmp_path):
    stream = make_stream("tensors", 0)
    expected = run(None, stream, "topk")
    calls = fail_at(0)
    run(tmp_path / "whole", stream, "topk")
    n_calls = calls["n"]
    assert n_calls > 100
    # Checkpoints are all alike: every write of the first and of the end, and some between.
    for number in [*range(1, 50), *range(50, n_calls - 30, 37), *range(n_calls - 30, n_calls + 1)]:
        out = tmp_path / f"run-{number}"
        fail_at(number, FAULTS[fault])
        with pytest.raises(OSError, match=re.escape(FAULTS[fault].strerror)):
            run(out, stream, "topk")
        fail_at(0)
        assert_same(run(out, stream, "topk"), expected)


def begin(out, source, architecture, seed=0):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(out), source, architecture, str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_until_it_ends(out, source, architecture, seed, n_kills):
    """Kills the run at random moments after its first step, then lets it end."""
    chance = random.Random(seed)
    for _ in range(n_kills):
        process = begin(out, source, architecture, seed)
        assert process.stdout.readline() == "begins\n"
        time.sleep(chance.uniform(0.0, 1.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = begin(out, source, architecture, seed)
    output, errors = process.communicate(timeout=300)
    assert output.endswith("ended\n"), errors


@pytest.mark.parametrize("source", ["tensors"])
def test_a_run_killed_twice_ends_with_the_same_weights(source, tmp_path):
    kill_until_it_ends(tmp_path / "run", source, "topk", 0, 2)
    assert_same(sf.Bank.load(tmp_path / "run"), run(None, make_stream(source, 0), "topk"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
@pytest.mark.parametrize("source", ["tensors", "live"])
def test_a_run_killed_at_random_ends_with_the_same_weights(source, architecture, seed, tmp_path):
    """24 kills in all; the threads of both sides are one, as sums depend on their number."""
    kill_until_it_ends(tmp_path / "run", source, architecture, seed, 2)
    expected = begin(tmp_path / "whole", source, architecture, seed)
    assert expected.communicate()[0].endswith("ended\n")
    assert_same(sf.Bank.load(tmp_path / "run"), sf.Bank.load(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(number, monkeypatch, tmp_path):
    stream = make_stream("tensors", 0)
    plain = BankLearner.step

    def step(self, *batch):
        if self.step_number == 4:  # the fifth step; the sixth one's batch is being read
            os.kill(os.getpid(), number)
        return plain(self, *batch)

    monkeypatch.setattr(BankLearner, "step", step)
    before = signal.getsignal(number)
    with pytest.raises(RunInterrupted, match=r"before step 6 ended.*resume=True") as stop:
        run(tmp_path / "run", stream, "topk")
    assert isinstance(stop.value, KeyboardInterrupt)
    assert signal.getsignal(number) == before
    assert (tmp_path / "run" / "checkpoints" / "step-000000006").is_dir()
    monkeypatch.undo()
    assert_same(run(tmp_path / "run", stream, "topk"), run(None, stream, "topk"))


def test_a_second_run_in_the_same_folder_is_refused_while_one_goes_on(monkeypatch, tmp_path):
    stream = make_stream("tensors", 0)
    plain = BankLearner.step
    refused = []

    def step(self, *batch):
        if self.step_number == 2 and not refused:
            with pytest.raises(BlockingIOError, match="one writer at a time") as error:
                run(tmp_path / "run", make_stream("tensors", 0), "topk")
            refused.append(error)
        return plain(self, *batch)

    monkeypatch.setattr(BankLearner, "step", step)
    run(tmp_path / "run", stream, "topk")
    assert refused
