"""Batches that are read ahead: the same ones, and the position still that of the last given."""

import threading

import pytest
import torch
from resumable_run import make_stream

import saefeat as sf
from saefeat.training.callbacks import CallbackError
from saefeat.training.prefetch import prefetched


class Counting:
    """Batches that know how many were asked for, and by which thread."""

    def __init__(self, n):
        self.n, self.asked, self.threads = n, 0, set()

    def __iter__(self):
        return self

    def __next__(self):
        self.threads.add(threading.current_thread())
        if self.asked == self.n:
            raise StopIteration
        self.asked += 1
        return {"number": torch.tensor([self.asked])}


def test_the_next_batch_is_read_while_one_is_in_use_in_another_thread():
    batches = Counting(5)
    given = []
    for batch in prefetched(batches, lambda: False):
        given.append(int(batch["number"]))
        # By the time that this one comes back, the next has been asked for.
        next_is_read = threading.Event()
        threading.Timer(0.05, next_is_read.set).start()
        next_is_read.wait()
        assert batches.asked == min(5, len(given) + 1)
    assert given == [1, 2, 3, 4, 5]
    assert threading.main_thread() not in batches.threads


def test_where_the_position_is_kept_nothing_is_read_ahead():
    batches = Counting(6)
    keeps = iter([False, True, False, True, True, False])
    wanted = []
    for _ in prefetched(batches, lambda: wanted.append(next(keeps)) or wanted[-1]):
        if wanted[-1]:
            assert batches.asked == len(wanted)
    assert len(wanted) == 6


def test_an_error_while_reading_reaches_the_caller():
    stream = make_stream("tensors", 0)
    stream._source._tensors["a"][:] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        list(prefetched(stream.batches(300), lambda: False))


@pytest.mark.parametrize("in_folder", [False, True])
def test_nothing_is_read_any_more_once_training_has_failed(tmp_path, in_folder):
    class Failing(sf.Callback):
        def record(self, record):
            raise RuntimeError("enough")

    x = torch.randn(4_000, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CallbackError) as error:
        sf.train(
            sf.ActivationStream.from_tensors({"a": x}, batch_size=100),
            sf.TopKConfig(k=2),
            n_tokens=2_000,
            out=tmp_path / "run" if in_folder else None,
            log_every=1,
            progress=False,
            callbacks=[Failing()],
        )
    # The error, which is still here, has all that raised it.
    assert error.traceback
    assert not [one for one in threading.enumerate() if one.name.startswith("saefeat-reads")]
