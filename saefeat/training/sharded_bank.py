"""A bank whose dictionaries are divided among processes: each trains some, on whole batches."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from saefeat.core.distributed import Ranks
from saefeat.dictionaries.base import Dictionary
from saefeat.training.bank import Bank, Key
from saefeat.training.bank_learner import BankLearner, Measured
from saefeat.training.learner import Learner


def owners(dictionaries: Mapping[Key, Dictionary], n_processes: int) -> dict[Key, int]:
    """Which process trains each dictionary, so that each has about as many weights.

    The dictionaries of one hook, which share its rows and their scores, stay together where there
    are hooks enough. The largest go first, each to the process that has least (Graham 1969).

    Raises:
        ValueError: There are fewer dictionaries than processes.
    """
    if len(dictionaries) < n_processes:
        raise ValueError(
            f"A bank of {len(dictionaries)} dictionaries cannot be divided among {n_processes} "
            "processes. Start fewer, or divide the batches instead: parallel='data'."
        )
    hooks = dict.fromkeys(key[0] for key in dictionaries)
    by_hook = len(hooks) >= n_processes
    groups: dict[Any, list[Key]] = {}
    for key in dictionaries:
        groups.setdefault(key[0] if by_hook else key, []).append(key)
    weights = {
        group: sum(one.numel() for key in keys for one in dictionaries[key].parameters())
        for group, keys in groups.items()
    }
    loads = [0] * n_processes
    owner: dict[Key, int] = {}
    for group in sorted(groups, key=lambda group: -weights[group]):
        least = loads.index(min(loads))
        loads[least] += weights[group]
        owner |= dict.fromkeys(groups[group], least)
    return owner


def own_dictionaries(dictionaries: Mapping[Key, Dictionary], ranks: Ranks) -> dict[Key, Dictionary]:
    """Those that this process trains."""
    owner = owners(dictionaries, ranks.size)
    return {key: one for key, one in dictionaries.items() if owner[key] == ranks.rank}


class ShardedBankLearner(BankLearner):
    """Trains the dictionaries of this process, and saves their state; its bank is that of all.

    What it does to a dictionary is to the last bit what one process alone does.

    Args:
        dictionaries: The whole bank, by key.
        peers: The processes that divide it.
        options: See `BankLearner`.
    """

    def __init__(
        self, dictionaries: Mapping[Key, Dictionary], *, peers: Ranks, **options: Any
    ) -> None:
        self.peers = peers
        self.owners = owners(dictionaries, peers.size)
        self.asked_for = list(dictionaries)
        # As one process orders them: those of a hook together.
        hooks = dict.fromkeys(key[0] for key in dictionaries)
        self.order = [key for hook in hooks for key in dictionaries if key[0] == hook]
        bank = Bank(dictionaries)
        self._wanted: list[set[str]] = [set() for _ in range(peers.size)]
        for key, rank in self.owners.items():
            self._wanted[rank] |= {
                *bank.reads[key],
                bank[key].origin.target_hook_name or bank.reads[key][0],
            }
        own = own_dictionaries(dictionaries, peers)
        self.blanks = {key: one for key, one in dictionaries.items() if key not in own}
        super().__init__(own, **options)

    @property
    def hooks_wanted(self) -> list[set[str]]:
        """Hooks that the dictionaries of each process read or predict."""
        return self._wanted

    def finish(self) -> Bank:
        """The whole bank, in every process; see `BankLearner`."""
        own = super().finish()
        gathered = dict(self._gathered(iter((key, own[key]) for key in self.order if key in own)))
        return Bank({key: gathered[key] for key in self.asked_for})

    def of_all(self, measured: Measured) -> Measured:
        """What a step measured, of the whole bank."""
        own: Measured = {
            key: {name: float(value) for name, value in terms.items()}
            for key, terms in measured.items()
        }
        everyones: Measured = {}
        for part in self.peers.each(own):
            everyones.update(part)
        return {key: everyones[key] for key in self.order}

    def _numbered(self) -> Iterator[tuple[str, Key, Learner]]:
        for key, learner in self._all().items():
            yield f"{self.order.index(key)}.", key, learner

    def _gathered(self, own: Iterator[tuple[Key, Dictionary]]) -> Iterator[tuple[Key, Dictionary]]:
        for key in self.order:
            mine = next(own)[1] if self.owners[key] == self.peers.rank else None
            yield key, sent(mine, self.owners[key], self.blanks.get(key), self.peers)


def sent(
    dictionary: Dictionary | None, source: int, blank: Dictionary | None, ranks: Ranks
) -> Dictionary:
    """The dictionary of one process, for all.

    Args:
        dictionary: It, where this is the process that has it.
        source: Number of that process.
        blank: One of its kind and shape, for the others.
        ranks: The processes.
    """
    tensors = ranks.tensors_of(source, None if dictionary is None else dictionary.state_dict())
    origin = ranks.told(None if dictionary is None else dictionary.origin, source)
    if dictionary is not None:
        return dictionary
    assert blank is not None
    copied = copy.deepcopy(blank).requires_grad_(False)
    copied.load_state_dict(tensors)
    assert origin is not None
    copied.origin = origin
    return copied
