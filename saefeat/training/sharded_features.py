"""Dictionaries whose latents are divided among processes, each of which has every batch whole.

By plain collectives: with DTensor in their place a wide step takes as long and a small one longer,
and a wide step of operators on DTensors, which are dense, five times as long
(`benchmarks/device_mesh.py`).
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.distributed import Ranks
from saefeat.core.tensor_parts import Part, Parts, SavedTensors
from saefeat.dictionaries import sae_lens
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.batch_topk import BatchTopK
from saefeat.dictionaries.topk import TopK
from saefeat.kernels.dispatch import Kernels
from saefeat.kernels.shared_latents import SummedProducts
from saefeat.training.bank import Bank, Key, dictionary_folder
from saefeat.training.bank_learner import BankLearner, Measured

BY_LATENT = ("W_dec", "encoder", "b_enc", "tokens_since_fired")
"""Tensors of which each process has some rows; of the others each has all."""


def shard_of(whole: Dictionary, ranks: Ranks) -> Dictionary:
    """A dictionary of this process's share of the latents of one.

    Raises:
        ValueError: Its kind cannot be divided, or not among so many.
    """
    # Matryoshka and crosscoders are BatchTopK too.
    is_exact = type(whole) in (TopK, BatchTopK)
    if not isinstance(whole, TopK | BatchTopK) or not is_exact or whole.is_transcoder:
        kind = f"{type(whole).__name__}{' transcoder' if whole.is_transcoder else ''}"
        raise ValueError(
            f"parallel='features' divides the latents of TopK and BatchTopK dictionaries, and this "
            f"is a {kind}. Divide batches or the bank: parallel='data' or 'bank'."
        )
    if whole.d_sae % ranks.size or whole.d_sae // ranks.size < whole.config.k:
        raise ValueError(
            f"The {whole.d_sae} latents of the dictionary of {whole.hook_name} do not make "
            f"{ranks.size} equal parts of at least k={whole.config.k}. Choose another expansion "
            "factor or number of processes."
        )
    part = ranks.part(whole.d_sae)
    shard = type(whole)(whole.config, whole.d_in, whole.d_sae // ranks.size, whole.origin)
    own = {name: x[part] if name in BY_LATENT else x for name, x in whole.state_dict().items()}
    shard.load_state_dict(own)
    return shard


class FeatureShardedLearner(BankLearner):
    """Trains a part of the latents of every dictionary, and saves their state; its bank is whole.

    Latents are selected among those of all processes, and what these decode to is added up: a step
    sums an [n, d] matrix over the processes, and no gradient of a weight leaves its process.

    Args:
        dictionaries: The bank, its dictionaries whole.
        peers: The processes.
        kernels: Backend of the sparse products.
        options: See `BankLearner`.
    """

    def __init__(
        self,
        dictionaries: Mapping[Key, Dictionary],
        *,
        peers: Ranks,
        kernels: Kernels,
        **options: Any,
    ) -> None:
        self.peers = peers
        shards = {key: shard_of(one, peers) for key, one in dictionaries.items()}
        super().__init__(
            shards, kernels=SummedProducts(kernels, peers), feature_ranks=peers, **options
        )

    @property
    def hooks_wanted(self) -> list[set[str]]:
        """All, in every process."""
        return [set(self.scales)] * self.peers.size

    def finish(self) -> Bank:
        """The bank, whole in every process; see `BankLearner`."""
        self._check_activations()
        self._check_losses()
        return Bank({key: self._whole(key) for key in self._all()})

    def prepare_dictionaries(self, saes: Path) -> None:
        """A folder for each, whose file of weights has room for all latents."""
        for key in self._all():
            sae_lens.prepare(self._outline(key), dictionary_folder(saes, key))

    def save_dictionaries(self, saes: Path) -> list[Path]:
        """Writes this process's latents of each; see `BankLearner`."""
        self._check_activations()
        self._check_losses()
        files: list[Path] = []
        for number, (key, learner) in enumerate(self._all().items()):
            shard = self._folded(key, copy.deepcopy(learner.dictionary))
            folder, first = dictionary_folder(saes, key), self.peers.rank * shard.d_sae
            sae_lens.save_latents(shard, self._outline(key), folder, first)
            if number % self.peers.size == self.peers.rank:
                files += folder.iterdir()
        return files

    def of_all(self, measured: Measured) -> Measured:
        """What a step measured, of all latents."""
        own = {
            key: (float(terms["l0"]), float(terms["dead_fraction"]))
            for key, terms in measured.items()
        }
        everyones = self.peers.each(own)
        return {
            key: {
                **terms,
                "l0": sum(one[key][0] for one in everyones),
                "dead_fraction": sum(one[key][1] for one in everyones) / self.peers.size,
            }
            for key, terms in measured.items()
        }

    def state(self) -> Parts:
        """See `BankLearner`; a part of what is by latent, and the rest in the first process.

        It talks to the others, which have other numbers of dead latents.
        """
        rank, size = self.peers.rank, self.peers.size
        n_dead = self.peers.each([len(one.dead_latents) for one in self._all().values()])
        state: dict[str, Tensor | Part] = {}
        for name, x in super().state().items():
            assert isinstance(x, Tensor)
            if _is_by_latent(name, x):
                state[name] = Part(rows=x, first=rank * len(x), n=size * len(x))
            elif self.peers.is_first:
                state[name] = x
        for number, learner in enumerate(self._all().values()):
            counts = [of_all[number] for of_all in n_dead]
            latents = learner.dead_latents + rank * learner.dictionary.d_sae
            place = {"first": sum(counts[:rank]), "n": sum(counts)}
            state[f"{number}.dead_latents"] = Part(rows=latents, **place)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `BankLearner`; reads no rows of other latents."""
        assert isinstance(state, SavedTensors)
        super().restore(_OwnLatents(state, self.peers))

    def _initialise(
        self,
        dictionary: Dictionary,
        key: Key,
        centre: Float[Tensor, " d_out"],
        sample: Mapping[str, Float[Tensor, "n _"]],
    ) -> None:
        """As one process does: for a moment there is a whole dictionary, without gradients."""
        whole = self._blank(dictionary).to(self.device)
        super()._initialise(whole, key, centre, sample)
        dictionary.load_state_dict(shard_of(whole, self.peers).state_dict())

    def _blank(self, shard: Dictionary) -> Dictionary:
        return type(shard)(shard.config, shard.d_in, shard.d_sae * self.peers.size, shard.origin)

    def _outline(self, key: Key) -> Dictionary:
        """The whole dictionary, as it is now but for its weights, which are on the meta device."""
        with torch.device("meta"):
            whole = self._blank(self._all()[key].dictionary)
        return whole.with_origin(n_tokens=whole.origin.n_tokens + self.n_tokens_seen)

    def _whole(self, key: Key) -> Dictionary:
        """A dictionary that reads raw activations, in every process."""
        shard = self._all()[key].dictionary
        own = {name: x.cpu() for name, x in shard.state_dict().items()}
        parts = self.peers.exchange([own] * self.peers.size)
        whole = self._blank(shard)
        whole.load_state_dict(
            {
                name: torch.cat([part[name] for part in parts]) if _is_by_latent(name, x) else x
                for name, x in own.items()
            }
        )
        return self._folded(key, whole)


class _OwnLatents(Mapping[str, Tensor]):
    """The state of whole dictionaries, as that of this process's share of their latents."""

    def __init__(self, state: SavedTensors, ranks: Ranks) -> None:
        self._state = state
        self._ranks = ranks

    def __getitem__(self, name: str) -> Tensor:
        shape = self._state.shape(name)
        if name.endswith(".dead_latents"):
            n_latents, *_ = self._state.shape(f"{name.partition('.')[0]}.dictionary.W_dec")
            own, dead = self._ranks.part(n_latents), self._state[name]
            return dead[(dead >= own.start) & (dead < own.stop)].sub(own.start)
        if name.rpartition(".")[2] in BY_LATENT and shape:
            return self._state.rows(name, self._ranks.part(shape[0]))
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _is_by_latent(name: str, tensor: Tensor) -> bool:
    # Adam also counts the steps of each.
    return name.rpartition(".")[2] in BY_LATENT and tensor.ndim > 0
