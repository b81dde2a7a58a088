"""Each process writes its own part of a checkpoint, and any number of them goes on from all."""

import errno
import json
import os
import resource
import shutil
import signal

import pytest
import torch
from processes import KilledError, results, together
from resumable_run import make_stream, run
from safetensors.torch import load_file, save_file

import saefeat as sf
from saefeat.core.distributed import PeerLostError, Ranks, current
from saefeat.core.tensor_parts import Part, SavedTensors, write_parts
from saefeat.training import checkpoint
from saefeat.training import run as training_run
from saefeat.training.bank_learner import BankLearner
from saefeat.training.checkpoint import load_newest, save_checkpoint

N_STEPS = 8
KIND = "batch_topk"


pytestmark = pytest.mark.usefixtures("selects_in_float32")


@pytest.fixture(scope="module")
def stream():
    return make_stream("live", 0)


class StopError(Exception):
    """The end of a part of a run."""


def begin(out, stream, parallel, at=None, action=None, kind=KIND):
    """A run, `action` being done before the step with number `at`."""
    plain = BankLearner.step

    def step(self, *arguments):
        if self.step_number == at:
            action(self)
        return plain(self, *arguments)

    BankLearner.step = step
    try:
        bank = run(out, stream, kind, n_steps=N_STEPS, parallel=parallel, kernels="stock")
    finally:
        BankLearner.step = plain
    return {key: one.state_dict() for key, one in bank.items()}


def stop(learner):
    raise StopError


def stopped(folder, size, *arguments):
    """Runs that end in StopError, in one process or several."""
    if size == 1:
        with pytest.raises(StopError):
            begin(*arguments)
        return
    for outcome in together(folder, begin, *arguments, size=size):
        assert isinstance(outcome, StopError), outcome


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_a_bank_goes_on_to_the_same_bits_with_fewer_and_with_more_processes(stream, tmp_path):
    expected, out = begin(None, stream, "bank"), tmp_path / "run"
    for size, at in ((4, 2), (2, 4), (1, 6)):
        # One step later, since the checkpoint of an even step is written after it.
        stopped(tmp_path, size, out, stream, "bank", at + 1, stop)
    for found in results(tmp_path, begin, out, stream, "bank"):
        assert set(found) == set(expected)
        for key in expected:
            assert_same(found[key], expected[key])


def test_latents_go_on_to_the_same_bits(stream, tmp_path):
    expected, *_ = results(tmp_path, begin, None, stream, "features")
    stopped(tmp_path, 2, tmp_path / "run", stream, "features", 5, stop)
    for found in results(tmp_path, begin, tmp_path / "run", stream, "features"):
        for key in expected:
            assert_same(found[key], expected[key])


def test_what_any_processes_read_is_what_any_others_wrote(stream, tmp_path):
    source = tmp_path / "run"
    stopped(tmp_path, 4, source, stream, "features", 3, stop)
    expected = None
    divided = [(2, "features"), (4, "bank"), (4, "features"), (2, "bank"), (2, "data")]
    for size, parallel in [(1, "data"), *divided]:
        target = tmp_path / f"{parallel} by {size}"

        def rewrite(learner, source=source, target=target, begins=expected is None):
            if begins:  # so that no list is the same as another for being empty
                for number, one in enumerate(learner._all().values()):
                    one.dead_latents = torch.arange(number, 25, 3)
            found = load_newest(source / "checkpoints")
            rows = dict(found.stream_rows) if current().is_first else {}
            stream = (found.stream, rows)
            save_checkpoint(target / "checkpoints", learner, stream, keep_last=1, ranks=current())
            raise StopError

        stopped(tmp_path, size, source, stream, parallel, 2, rewrite)
        shutil.copy(source / "config.json", target)
        source = target
        written = load_newest(target / "checkpoints").training
        saes = sf.Bank.load(target / "checkpoints" / "step-000000002")
        expected, expected_saes = expected or written, saes if expected is None else expected_saes
        assert_same(written, expected)
        assert list(saes) == list(expected_saes)
        for key, one in expected_saes.items():
            assert_same(saes[key].state_dict(), one.state_dict())
            assert saes[key].origin == one.origin


def n_bytes(tensors):
    return sum(x.numel() * x.itemsize for x in tensors)


def is_divided(name):
    """Of the state, but for a bias, and a generator's 5 kB, which there is but once."""
    return name[0].isdigit() and not name.endswith(("b_dec", "generator", "loss_sum", "step"))


@pytest.mark.parametrize("parallel", ["bank", "features"])
def test_no_process_sends_writes_or_reads_more_than_its_share(parallel, monkeypatch, tmp_path):
    stream, size, out = make_stream("tensors", 0), 4, tmp_path / "run"
    plain_pwrite, plain_rows, counted, read = os.pwrite, SavedTensors.rows, [], {}

    def refuse(*arguments):
        raise AssertionError("tensors are sent")

    def pwrite(file, data, at):
        counted.append(len(data))
        return plain_pwrite(file, data, at)

    def saved_while_nothing_is_sent(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("exchange", "tensors_of", "stacked", "_reduced"):
                patch.setattr(Ranks, name, refuse)
            patch.setattr(os, "pwrite", pwrite)
            save_checkpoint(*arguments, **options)
        raise StopError(sum(counted))

    def rows(self, name, part):
        found = plain_rows(self, name, part)
        if is_divided(name):
            # Each once, since what checks types in the tests looks at the first of a mapping.
            read[name, part.start, part.stop] = n_bytes([found])
        return found

    monkeypatch.setattr(training_run, "save_checkpoint", saved_while_nothing_is_sent)
    outcomes = together(tmp_path, begin, out, stream, parallel, size=size)
    folder = out / "checkpoints" / "step-000000002"
    state = load_newest(out / "checkpoints").training
    share = sum(n_bytes([state[name]]) for name in state if is_divided(name)) / size
    parts = [folder / "training.safetensors", *sorted(folder.glob("training-*"))]
    assert len(parts) == size
    for path in parts:
        held = load_file(path)
        assert n_bytes(held[name] for name in held if is_divided(name)) <= 1.05 * share
    if parallel == "features":
        saes = sum(path.stat().st_size for path in folder.rglob("sae_weights.safetensors"))
        assert all(0 < outcome.args[0] <= 1.05 * saes / size for outcome in outcomes)

    def stop_and_count(learner):
        raise StopError(sum(read.values()))

    monkeypatch.setattr(SavedTensors, "rows", rows)
    for outcome in together(tmp_path, begin, out, stream, parallel, 2, stop_and_count, size=size):
        assert 0 < outcome.args[0] <= 1.2 * share  # 1.0, and that first one


@pytest.mark.parametrize(
    ("parallel", "fails", "n_free"),
    # Bytes with room for the dictionaries of these latents, or without.
    [("bank", 1, 10_000), ("features", 0, 20_000), ("features", 1, 10_000)],
)
def test_where_one_cannot_write_all_end_and_the_older_checkpoint_stays(
    parallel, fails, n_free, stream, tmp_path
):
    out = tmp_path / "run"

    def fill_disk(learner):
        if current().rank == fails:
            # Every larger file fails half written, as on a full disk.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_free, resource.RLIM_INFINITY))

    outcomes = together(tmp_path, begin, out, stream, parallel, 3, fill_disk)
    message = f"checkpoint after step 4, by process {fails} of 2, could not be written"
    for outcome in outcomes:
        assert isinstance(outcome, OSError)
        assert outcome.errno == errno.EFBIG
        assert message in str(outcome)
        assert "go on from the last with resume=True" in str(outcome)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000002"]
    expected, *_ = results(tmp_path, begin, None, stream, parallel)
    for found in results(tmp_path, begin, out, stream, parallel):
        for key in expected:
            assert_same(found[key], expected[key])


def test_one_killed_while_it_writes_leaves_the_older_checkpoint(stream, tmp_path):
    out = tmp_path / "run"

    def die_in_writing(learner):
        if current().rank == 1:
            checkpoint.write_parts = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    first, second = together(tmp_path, begin, out, stream, "bank", 3, die_in_writing)
    assert isinstance(first, PeerLostError)
    assert isinstance(second, KilledError)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000002"]


def test_a_part_that_is_damaged_is_noticed_by_all(stream, tmp_path, caplog):
    out = tmp_path / "run"
    stopped(tmp_path, 2, out, stream, "bank", 5, stop)
    part = out / "checkpoints" / "step-000000004" / "training-00001.safetensors"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)

    def steps_made(learner):
        raise StopError(learner.step_number)

    for outcome in together(tmp_path, begin, out, stream, "bank", 2, steps_made):
        assert isinstance(outcome, StopError), outcome
    part.unlink()
    shutil.rmtree(out / "checkpoints" / "step-000000002")
    for outcome in together(tmp_path, begin, out, stream, "bank"):
        assert isinstance(outcome, ValueError)
        assert "step-000000004 is damaged: training-00001.safetensors is missing" in str(outcome)


def test_a_folder_that_one_does_not_see_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VISIBLE_AFTER_SECONDS", 0.0)
    stream = make_stream("tensors", 0)
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()

    def elsewhere():
        os.chdir(tmp_path / str(current().rank))
        return begin("run", stream, "bank")

    for outcome in together(tmp_path, elsewhere):
        assert isinstance(outcome, FileNotFoundError)
        assert "Process 1 of 2 does not see run" in str(outcome)


def test_rows_are_read_across_parts_and_no_others(tmp_path):
    x = torch.randn(10, 3)
    for rank, (start, stop_) in enumerate([(0, 4), (4, 4), (4, 10)]):
        part = Part(rows=x[start:stop_], first=start, n=10)
        write_parts(tmp_path / f"{rank}", {"x": part, "count": torch.tensor(7)})
    saved = SavedTensors([tmp_path / f"{rank}" for rank in range(3)])
    assert torch.equal(saved["x"], x)
    assert int(saved["count"]) == 7
    assert saved.shape("x") == (10, 3)
    for start in range(11):
        for stop_ in range(start, 11):
            assert torch.equal(saved.rows("x", slice(start, stop_)), x[start:stop_])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"x": (4, 11)}, "of different tensors"),
        ({"x": (5, 10)}, "missing, or there twice"),
        ({"x": (3, 10)}, "missing, or there twice"),
        ({"x": (0, 10)}, "missing, or there twice"),
        ({"x": (-4, 10)}, "missing, or there twice"),
        ({"x": (4, 2**60)}, "of different tensors"),
        ({"x": ("4", 10)}, "should be"),
        ({"x": 4}, "should be"),
        ([], "should be"),
    ],
)
def test_parts_that_do_not_fit_are_refused(second, message, tmp_path):
    x = torch.randn(10, 3)
    write_parts(tmp_path / "0", {"x": Part(rows=x[:4], first=0, n=10)})
    text = json.dumps(second)
    save_file({"x": x[4:]}, tmp_path / "1", {"rows": text})
    with pytest.raises(ValueError, match=message):
        SavedTensors([tmp_path / "0", tmp_path / "1"])


def test_of_one_process_the_files_are_as_ever(tmp_path):
    out, stream = tmp_path / "run", make_stream("tensors", 0)
    stopped(tmp_path, 1, out, stream, "data", 3, stop)
    folder = out / "checkpoints" / "step-000000002"
    assert {path.name for path in folder.iterdir()} == {
        *("checkpoint.json", "training.safetensors", "stream.safetensors", "saes"),
    }
    assert training_run.save_checkpoint is save_checkpoint
