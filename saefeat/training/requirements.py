"""What a run will take of memory and disk, worked out from its sizes before anything is made.

What a kind of dictionary takes in a step is its own to say: see `dictionaries.costs`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from saefeat.activations.stream import ActivationStream
from saefeat.core.devices import fastest_dtype
from saefeat.dictionaries.base import Dictionary, DictionaryConfig
from saefeat.dictionaries.sparse_autoencoder import SparseAutoencoder
from saefeat.training.bank import Bank, Key
from saefeat.training.bank_learner import INITIAL_ROWS
from saefeat.training.new_bank import blank_dictionaries
from saefeat.training.shared_scores import groups

PARAMETER_BYTES = 16
"""Of a weight: itself, its gradient and Adam's two means, in float32."""
RECORD_BYTES = 320
"""Of a line in `metrics.jsonl`."""
JSON_BYTES = 3000
"""Of the JSON beside a dictionary's weights, and of its entry in `config.json`."""

BUFFER, WEIGHTS, SCORES, BATCHES = (
    "shuffle buffer",
    "weights, gradients, Adam",
    "encoders and scores",
    "batches",
)
"""Parts of the memory."""


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """The sizes of a run, and what follows from them.

    Memory is what the run takes beyond what the process holds when it begins. It is the sum of
    what lasts (the shuffle buffer; weights, gradients and Adam; the encoders and scores of the
    largest group of dictionaries) and the most of what comes and goes: a step, the first step,
    or the reading of activations.
    """

    dictionaries: Mapping[Key, Dictionary]
    """What is trained; only the shapes count, and the weights may be on the meta device."""
    remake: Callable[[Sequence[float]], Mapping[Key, Dictionary]] | None
    """The dictionaries of other expansion factors; None where they are trained already."""
    row_bytes: Mapping[str, int]
    """Of a raw row at each hook of the stream."""
    is_text: bool
    """Whether a language model makes the rows; else they are there, and read by the batch."""
    batch_size: int
    buffer_rows: int
    chunk_rows: int
    forward_bytes: int
    stream_device: torch.device
    unbuffered_bytes: int | None
    """What a stream that needs no shuffle buffer holds instead; None where there is a buffer."""
    n_tokens: int
    log_every: int
    checkpoint_every: int
    keep_last: int
    device: torch.device
    """Where the dictionaries are trained."""

    @classmethod
    def of(
        cls,
        stream: ActivationStream,
        config: DictionaryConfig | Bank,
        *,
        expansion_factors: Sequence[float],
        seeds: Sequence[int],
        targets: Mapping[str, str] | None,
        groups: Mapping[str, Sequence[str]] | None,
        n_tokens: int,
        log_every: int,
        checkpoint_every: int,
        keep_last: int,
        device: torch.device,
    ) -> "Requirements":
        """Those of `train` with the same arguments; no memory is taken for the dictionaries.

        Raises:
            ValueError: The options make no bank; see `blank_dictionaries`.
        """

        def remake(factors: Sequence[float]) -> Mapping[Key, Dictionary]:
            if isinstance(config, Bank):
                return config
            with torch.device("meta"):
                return blank_dictionaries(stream, config, factors, seeds, targets, groups)

        return cls(
            dictionaries=remake(expansion_factors),
            remake=None if isinstance(config, Bank) else remake,
            row_bytes=stream.row_bytes,
            is_text=stream.context_size is not None,
            batch_size=stream.batch_size,
            buffer_rows=stream.buffer_rows,
            chunk_rows=stream.chunk_rows,
            forward_bytes=stream.forward_bytes,
            stream_device=stream.device,
            unbuffered_bytes=None if stream.has_buffer else stream.buffer_bytes,
            n_tokens=n_tokens,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            keep_last=keep_last,
            device=device,
        )

    @property
    def n_steps(self) -> int:
        return math.ceil(self.n_tokens / self.batch_size)

    @property
    def n_parameters(self) -> int:
        """Weights of all dictionaries together."""
        return sum(_n_parameters(one) for one in self.dictionaries.values())

    @property
    def activation_bytes(self) -> int:
        """What flows out of the stream over the whole run."""
        return self.n_tokens * sum(self.row_bytes.values())

    @property
    def host_parts(self) -> dict[str, int]:
        """Host memory by part. Apple's GPUs share it, and count here."""
        return self._parts_on(is_cuda=False)

    @property
    def device_parts(self) -> dict[str, int]:
        """Memory of the CUDA device by part; none without one."""
        return self._parts_on(is_cuda=True)

    @property
    def metrics_bytes(self) -> int:
        """Of `metrics.jsonl`."""
        n_records = math.ceil(self.n_steps / self.log_every) + 1
        return n_records * len(self.dictionaries) * RECORD_BYTES

    @property
    def disk_bytes(self) -> int:
        """Of the run's folder at its fullest: one more checkpoint than is kept, while it is new."""
        n_checkpoints = min(self.keep_last + 1, (self.n_steps - 1) // self.checkpoint_every)
        return self._saes_bytes + self.metrics_bytes + n_checkpoints * self.checkpoint_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint: dictionaries, weights with Adam's means, and the shuffle buffer."""
        buffer = self.buffer_rows if self.unbuffered_bytes is None else 0
        return self._saes_bytes + 12 * self.n_parameters + buffer * sum(self.row_bytes.values())

    @property
    def _saes_bytes(self) -> int:
        weights = sum(
            tensor.numel() * 4
            for one in self.dictionaries.values()
            for tensor in one.file_tensors().values()
        )
        return weights + len(self.dictionaries) * JSON_BYTES

    @property
    def by_hook(self) -> dict[str, dict[Key, Dictionary]]:
        """The dictionaries by the hook that they read."""
        grouped: dict[str, dict[Key, Dictionary]] = {}
        for key, one in self.dictionaries.items():
            grouped.setdefault(key[0], {})[key] = one
        return grouped

    def _parts_on(self, *, is_cuda: bool) -> dict[str, int]:
        learning = (self.device.type == "cuda") == is_cuda
        reading = (self.stream_device.type == "cuda") == is_cuda
        row = sum(self.row_bytes.values())
        batch, chunk = self.batch_size * row, self.chunk_rows * row
        n_parameters = self.n_parameters
        lasting: dict[str, int] = {}
        if reading:
            # Also what the hooks are copied into, which each forward reuses.
            lasting[BUFFER] = (self.buffer_rows + self.chunk_rows) * row + chunk * self.is_text
            if self.unbuffered_bytes is not None:
                lasting[BUFFER] = self.unbuffered_bytes
        if learning:
            n_latents = sum(one.d_sae for one in self.dictionaries.values())
            lasting[WEIGHTS] = PARAMETER_BYTES * n_parameters + 8 * n_latents
            lasting[SCORES] = self._score_bytes()
        elif self.device.type == "cuda":
            # Made on the host, and brought back to it.
            lasting[WEIGHTS] = 4 * n_parameters
        # A source keeps its last chunk, and the loop its last batch, until they have the next.
        moments = [chunk + 2 * batch, batch + 3 * chunk + self.forward_bytes] if reading else [0]
        if learning:
            # The next batch is read while this one is learned from.
            read = max(moments)
            moments.append(read + self._step_bytes())
            begun = 8 * n_parameters + read + self._first_step_bytes()
            moments.append(begun - lasting[WEIGHTS] - lasting[SCORES])
        parts = {**lasting, BATCHES: max(moments)}
        return {name: n_bytes for name, n_bytes in parts.items() if n_bytes}

    def _score_bytes(self) -> int:
        """What `shared_scores` and the kinds keep, or make anew each time at the same size."""
        size = fastest_dtype(self.device).itemsize
        rows = encoders = scores = kept = 0
        for learners in self.by_hook.values():
            kept = max(kept, *(one.lasting_bytes(self.batch_size) for one in learners.values()))
            encoded = [one for one in learners.values() if isinstance(one, SparseAutoencoder)]
            widths = [one.d_sae for one in encoded]
            for group in groups(widths, self.batch_size) if encoded else ():
                d_in, width = encoded[0].d_in, sum(widths[group])
                rows = max(rows, self.batch_size * d_in)
                encoders = max(encoders, width * d_in)
                scores = max(scores, self.batch_size * width)
        return size * (rows + encoders + scores) + kept

    def _scaled_bytes(self) -> int:
        """The batch in float32, scaled, wherever it takes part; and unscaled at one hook.

        The hooks of a crosscoder are there twice, each by itself and side by side.
        """
        widths: dict[str, int] = {}
        for key, one in self.dictionaries.items():
            widths[key[0]] = one.d_in
            widths[one.origin.target_hook_name or key[0]] = one.d_out
            widths |= one.origin.hook_widths or {}
        return 4 * self.batch_size * (sum(widths.values()) + max(widths.values()))

    def _step_bytes(self) -> int:
        n = self.batch_size
        return self._scaled_bytes() + max(one.step_bytes(n) for one in self.dictionaries.values())

    def _first_step_bytes(self) -> int:
        """What initialisation takes: drawn rows, and scores where a kind looks at them."""
        n = min(self.batch_size, INITIAL_ROWS)
        most = max(one.initial_bytes(n) for one in self.dictionaries.values())
        return self._scaled_bytes() + most


def _n_parameters(dictionary: Dictionary) -> int:
    return sum(parameter.numel() for parameter in dictionary.parameters())
