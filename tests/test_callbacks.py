"""Callbacks: what they are told, the loggers' files as their own libraries read them, failures."""

import json
import time

import pytest
import torch

import saefeat as sf
from saefeat.training.callbacks import CallbackError

PLACE = ("step", "n_tokens", "wall_seconds", "hook_name", "expansion_factor", "seed")


@pytest.fixture(scope="module")
def stream():
    rows = torch.randn(900, 6, generator=torch.Generator().manual_seed(0))
    return sf.ActivationStream.from_tensors({"a": rows, "b": 2 * rows}, batch_size=50)


def train(stream, *callbacks, **options):
    settings = {"expansion_factors": [2], "n_tokens": 1000, "log_every": 4, "progress": False}
    return sf.train(stream, sf.TopKConfig(k=2), callbacks=callbacks, **settings | options)


class Listening(sf.Callback):
    """Keeps what it is told; raises in a step, or at the end, if so asked."""

    def __init__(self, fails_in=None):
        self.fails_in = fails_in
        self.starts, self.records, self.ends = [], [], []

    def start(self, description, step):
        self.starts.append((description, step))

    def record(self, record):
        self.records.append(dict(record))
        if record["step"] == self.fails_in:
            raise OSError("the network is down")

    def end(self, bank):
        self.ends.append(bank)
        if self.fails_in == "end":
            raise OSError("the network is down")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_callback_is_told_what_the_folder_says(stream, tmp_path):
    listening = Listening()
    bank = train(stream, listening, out=tmp_path / "run")
    ((description, step),) = listening.starts
    assert step == 0
    assert json.loads(json.dumps(description)) == json.loads(
        (tmp_path / "run/config.json").read_text()
    )
    assert listening.records == lines(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in listening.records][::2] == [1, 5, 9, 13, 17, 20]
    assert listening.ends == [bank]


def test_a_run_in_memory_tells_the_same_and_callbacks_change_no_weight(stream, tmp_path):
    listening = Listening()
    bank = train(stream, listening, sf.JSONLines(tmp_path / "own.jsonl"))
    silent = train(stream, out=tmp_path / "run")
    for key in bank:
        assert torch.equal(bank[key].W_dec, silent[key].W_dec)
    written, told = lines(tmp_path / "run/metrics.jsonl"), lines(tmp_path / "own.jsonl")
    for record in (*written, *told, *listening.records):
        del record["wall_seconds"]
    assert written == told == listening.records
    assert listening.ends == [bank]


@pytest.mark.parametrize("fails_in", [5, 17])
def test_a_callback_that_raises_leaves_a_checkpoint_to_go_on_from(stream, tmp_path, fails_in):
    bad, good = Listening(fails_in), Listening()
    message = rf"Listening raised in step {fails_in}: OSError: the network is down\. .*resume=True"
    with pytest.raises(CallbackError, match=message) as raised:
        train(stream, bad, good, out=tmp_path / "run")
    assert isinstance(raised.value.__cause__, OSError)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert not (tmp_path / "run/saes").exists()
    # It is told no more; the other one is. Both are told that the run did not get to its end.
    assert bad.records[-1]["step"] == fails_in
    assert len(bad.records) == len(good.records) - 1
    assert bad.ends == good.ends == [None]
    going_on = Listening()
    bank = train(stream, going_on, out=tmp_path / "run", resume=True)
    assert going_on.starts[0][1] == fails_in + 1
    for key, one in train(stream).items():
        assert torch.equal(one.W_dec, bank[key].W_dec)
    assert [one["step"] for one in lines(tmp_path / "run/metrics.jsonl")][::2] == [
        *(1, 5, 9, 13, 17, 20)
    ]


@pytest.mark.parametrize("fails_in", [20, "end"])
def test_dictionaries_are_on_disk_when_a_callback_raises_at_the_end(stream, tmp_path, fails_in):
    with pytest.raises(CallbackError, match="its dictionaries are in"):
        train(stream, Listening(fails_in), out=tmp_path / "run")
    assert len(sf.Bank.load(tmp_path / "run")) == 2


def test_without_a_folder_an_error_says_that_nothing_is_kept_until_the_end(stream, caplog):
    with pytest.raises(CallbackError, match=r"step 9.*Without `out` nothing"):
        train(stream, Listening(9))
    assert len(train(stream, Listening("end"))) == 2
    assert "Listening raised at the end, after training had ended" in caplog.text


def test_a_callback_that_cannot_start_stops_the_run_before_it_begins(stream, tmp_path):
    first = Listening()
    with pytest.raises(FileNotFoundError):
        train(stream, first, sf.JSONLines(tmp_path / "absent" / "x.jsonl"))
    assert first.records == []
    assert first.ends == [None]


def test_tensorboard_reads_its_curves(stream, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    listening = Listening()
    out, board = tmp_path / "run", tmp_path / "board"
    with pytest.raises(CallbackError):
        train(stream, sf.TensorBoard(board), Listening(9), out=out)
    train(stream, sf.TensorBoard(board), listening, out=out, resume=True)
    seen = EventAccumulator(str(board)).Reload()
    kept = lines(out / "metrics.jsonl")
    for hook in ("a", "b"):
        points = seen.Scalars(f"{hook}/x2-seed0/fvu")
        wanted = [(one["step"], one["fvu"]) for one in kept if one["hook_name"] == hook]
        assert [point.step for point in points] == [step for step, _ in wanted]
        assert [point.value for point in points] == pytest.approx([fvu for _, fvu in wanted])
    assert any("config" in name for name in seen.Tags()["tensors"])


def wandb_records(path):
    """The messages in an offline file: a LevelDB log after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, message = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def test_weights_and_biases_offline_holds_what_was_measured(stream, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    listening = Listening()
    logger = sf.WeightsAndBiases(project="x", mode="offline", dir=str(tmp_path))
    train(stream, logger, listening)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # Another process writes the file, and goes on for a moment after the run has finished.
    for _ in range(100):
        if any(record.HasField("exit") for record in wandb_records(path)):
            break
        time.sleep(0.1)
    points, config, exit_codes = {}, {}, []
    for record in wandb_records(path):
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
        if record.HasField("exit"):
            exit_codes.append(record.exit.exit_code)
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if row:
            points[row["_step"]] = row
    assert sorted(points) == [1, 5, 9, 13, 17, 20]
    for told in listening.records:
        logged = points[told["step"]]
        for name, value in told.items():
            if name not in PLACE:
                assert logged[f"{told['hook_name']}/x2-seed0/{name}"] == pytest.approx(value)
    assert config["n_tokens"] == 1000
    assert exit_codes == [0]
