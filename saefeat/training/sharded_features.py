"""Dictionaries whose latents are divided among processes, each of which has every batch whole.

By plain collectives: with DTensor in their place a wide step takes as long and a small one longer,
and a wide step of operators on DTensors, which are dense, five times as long
(`benchmarks/device_mesh.py`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.distributed import Ranks
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.batch_topk import BatchTopK
from saefeat.dictionaries.topk import TopK
from saefeat.kernels.dispatch import Kernels
from saefeat.kernels.shared_latents import SummedProducts
from saefeat.training.bank import Bank, Key
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
    """Trains a part of the latents of every dictionary; its state and its bank are whole.

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
        whole = {key: self._whole(key, to_all=True) for key in self._all()}
        return Bank({key: one for key, one in whole.items() if one is not None})

    def snapshots(self) -> list[tuple[Key, Dictionary]]:
        """The bank as it is now, whole in the first process; nothing in the others."""
        self._check_activations()
        self._check_losses()
        whole = {key: self._whole(key, to_all=False) for key in self._all()}
        return [(key, one) for key, one in whole.items() if one is not None]

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

    def state(self) -> dict[str, Tensor]:
        """See `BankLearner`; that of whole dictionaries, in the first process alone."""
        own = {name: tensor.cpu() for name, tensor in super().state().items()}
        for number, learner in enumerate(self._all().values()):
            first = self.peers.rank * learner.dictionary.d_sae
            own[f"{number}.dead_latents"] = own[f"{number}.dead_latents"] + first
        return self._joined(own, to_all=False)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `BankLearner`; takes its part of the state of whole dictionaries."""
        own = {
            name: x[self.peers.part(len(x))] if _is_by_latent(name, x) else x
            for name, x in state.items()
        }
        for number, learner in enumerate(self._all().values()):
            name, d_sae = f"{number}.dead_latents", learner.dictionary.d_sae
            if name in state:
                dead = state[name] - self.peers.rank * d_sae
                own[name] = dead[(dead >= 0) & (dead < d_sae)]
        super().restore(own)

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

    def _whole(self, key: Key, *, to_all: bool) -> Dictionary | None:
        """A dictionary that reads raw activations, in the first process or all."""
        shard = self._all()[key].dictionary
        tensors = self._joined({n: x.cpu() for n, x in shard.state_dict().items()}, to_all=to_all)
        if not tensors:
            return None
        whole = self._blank(shard)
        whole.load_state_dict(tensors)
        return self._folded(key, whole)

    def _joined(self, own: Mapping[str, Tensor], *, to_all: bool) -> dict[str, Tensor]:
        """Parts put together, in the first process or all; nothing in the others."""
        others = [own if to_all else {}] * (self.peers.size - 1)
        parts = self.peers.exchange([own, *others])
        if not to_all and not self.peers.is_first:
            return {}
        return {
            name: torch.cat([part[name] for part in parts])
            if _is_by_latent(name, x) or name.endswith(".dead_latents")
            else x
            for name, x in own.items()
        }


def _is_by_latent(name: str, tensor: Tensor) -> bool:
    # Adam also counts the steps of each.
    return name.rpartition(".")[2] in BY_LATENT and tensor.ndim > 0
