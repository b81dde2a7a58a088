"""For `test_processes`: `python forked_work.py STORE` works before a fork and in the forks.

Two workers of a data loader read the store, encode with a dictionary that their parent has used
already, and train one of their own; the parent does the same itself and prints the differences.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import saefeat as sf


def trained(stream: sf.ActivationStream, config: Any) -> sf.Dictionary:
    bank = sf.train(stream, config, expansion_factors=[2], n_tokens=600, progress=False)
    return bank["a", 2, 0]


class Encoded(IterableDataset[dict[str, torch.Tensor]]):
    """The batches of a store with their codes, and what a training in the worker ends with."""

    def __init__(self, stream: sf.ActivationStream, dictionary: sf.Dictionary) -> None:
        self.stream = stream
        self.dictionary = dictionary

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        own = trained(self.stream, sf.TopKConfig(k=4)).W_dec
        for batch in self.stream:
            codes = self.dictionary.encode(batch["a"]).to_dense()
            yield {
                "worker": torch.tensor(-1 if worker is None else worker.id),
                "x": batch["a"],
                "codes": codes,
                "decoder": own,
            }


if __name__ == "__main__":
    torch.set_num_threads(2)
    stream = sf.ActivationStream.from_store(sys.argv[1], batch_size=200)
    # Its loops have run in threads, which no fork inherits.
    data = Encoded(stream, trained(stream, sf.MatchingPursuitConfig(k=4)))
    expected = list(data)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    found = list(loader)
    for worker in range(2):
        given = [batch for batch in found if batch["worker"] == worker]
        assert len(given) == len(expected) > 3
        for one, other in zip(given, expected, strict=True):
            assert torch.equal(one["x"], other["x"])
            torch.testing.assert_close(one["codes"], other["codes"])
            torch.testing.assert_close(one["decoder"], other["decoder"], rtol=1e-3, atol=1e-4)
    print("the same in", sorted({int(batch["worker"]) for batch in found}))
