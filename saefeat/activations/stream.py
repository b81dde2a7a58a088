"""The stream of activations, made from a model, several models, tensors or a store.

Shape letters: n rows, d width of a hook.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from saefeat.activations.hook_reader import HookReader, ModelsReader
from saefeat.activations.row_stream import RowStream
from saefeat.activations.sources import ModelSource, TensorSource
from saefeat.activations.store_reader import open_store_sources
from saefeat.activations.stream_checks import check_fit, check_numbers, rows_to_mix, split_rows
from saefeat.activations.tokens import Tokens

# Tokens in one forward, unless told otherwise: enough to keep two cores or a GPU busy with a
# small model, few enough that a large model's activations fit.
TOKENS_PER_FORWARD = 2048


class ActivationStream(RowStream):
    """Activations as batches {hook name: [n, d]}, row i being the same token at every hook.

    Each epoch visits the items of the source (contexts of a text, rows of a tensor) in a new
    random order, and draws batches at random from a buffer that is refilled as it empties, so
    that a batch mixes tokens of many contexts. Every row comes once in an epoch. The seed
    decides all of it: each iteration starts from it, and gives the same batches again.

    Batches are new tensors, in the dtype and on the device of the source.
    """

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokens: Tokens,
        hooks: str | Sequence[str],
        *,
        batch_size: int = 4096,
        buffer_rows: int | None = None,
        contexts_per_forward: int | None = None,
        seed: int = 0,
        max_norm_ratio: float | None = 10.0,
        flatten_heads: bool = False,
    ) -> "ActivationStream":
        """Reads the activations of `model` on `tokens` as they are needed.

        Positions that do not count (`Tokens.counts`) give no rows, nor do attention sinks: a
        token whose norm at any hook is above `max_norm_ratio` times that hook's running
        median is left out at all hooks (see `sources.OutlierRule`) and counted in `left_out`.

        Args:
            model: A TransformerLens model.
            tokens: From `load_tokens`.
            hooks: Names or patterns, see `resolve_hooks`.
            batch_size: Rows in a batch.
            buffer_rows: Rows among which batches are drawn; `buffer_bytes` says what memory
                they take. None: 16 batches, and no fewer than 65,536 rows.
            contexts_per_forward: None: as many as make 2,048 tokens.
            seed: Decides the order of everything.
            max_norm_ratio: None leaves no token out for its norm.
            flatten_heads: Reads hooks with a head axis as one vector for each position.

        Raises:
            TypeError: `tokens` is no `Tokens`.
            ValueError: A hook cannot be read (see `HookReader`), the tokens do not fit the
                model, or a number is out of range. While iterating: NaN or infinite
                activations, hook and context named.
        """
        check_fit(model, tokens)
        return cls._from_reader(
            HookReader(model, hooks, flatten_heads=flatten_heads),
            tokens,
            batch_size=batch_size,
            buffer_rows=buffer_rows,
            contexts_per_forward=contexts_per_forward,
            seed=seed,
            max_norm_ratio=max_norm_ratio,
            model_name=getattr(getattr(model, "cfg", None), "model_name", None),
        )

    @classmethod
    def from_models(
        cls,
        models: Mapping[str, Any],
        tokens: Tokens,
        hooks: str | Sequence[str],
        *,
        batch_size: int = 4096,
        buffer_rows: int | None = None,
        contexts_per_forward: int | None = None,
        seed: int = 0,
        max_norm_ratio: float | None = 10.0,
        flatten_heads: bool = False,
    ) -> "ActivationStream":
        """Reads the activations of several models on the same tokens, as for `from_model`.

        Row i is the same token in all of them, so that a crosscoder of all hooks learns what
        two models share. A token that is left out at one hook is left out in every model.

        Args:
            models: TransformerLens models by a name for each, with one vocabulary. The hook
                "blocks.3.hook_out" of the model "a" is called "blocks.3.hook_out@a".
            tokens: As for `from_model`.
            hooks: Names or patterns, read in every model.
            batch_size: As for `from_model`.
            buffer_rows: As for `from_model`.
            contexts_per_forward: As for `from_model`.
            seed: As for `from_model`.
            max_norm_ratio: As for `from_model`.
            flatten_heads: As for `from_model`.

        Raises:
            TypeError: `tokens` is no `Tokens`.
            ValueError: There are no models, a name has a slash; or see `from_model`.
        """
        if not models or any("/" in name for name in models):
            raise ValueError(
                f"It needs models by names without a slash, got the names {list(models)}."
            )
        for model in models.values():
            check_fit(model, tokens)
        readers = {
            name: HookReader(model, hooks, flatten_heads=flatten_heads)
            for name, model in models.items()
        }
        return cls._from_reader(
            ModelsReader(readers),
            tokens,
            batch_size=batch_size,
            buffer_rows=buffer_rows,
            contexts_per_forward=contexts_per_forward,
            seed=seed,
            max_norm_ratio=max_norm_ratio,
            model_name="+".join(models),
        )

    @classmethod
    def _from_reader(
        cls,
        reader: HookReader | ModelsReader,
        tokens: Tokens,
        *,
        batch_size: int,
        buffer_rows: int | None,
        contexts_per_forward: int | None,
        seed: int,
        max_norm_ratio: float | None,
        model_name: str | None,
    ) -> "ActivationStream":
        if contexts_per_forward is None:
            contexts_per_forward = max(1, TOKENS_PER_FORWARD // tokens.context_size)
        if contexts_per_forward < 1 or (max_norm_ratio is not None and max_norm_ratio <= 1):
            raise ValueError(
                f"contexts_per_forward={contexts_per_forward} must be at least 1, and "
                f"max_norm_ratio={max_norm_ratio} above 1 (half of all norms are above the median)."
            )
        mask = tokens.attention_mask
        example = reader.read(tokens.ids[:1], None if mask is None else mask[:1])
        n_train = tokens.n_contexts - tokens.n_held_out
        train, held_out = (
            ModelSource(
                reader,
                tokens,
                contexts,
                contexts_per_forward=contexts_per_forward,
                max_norm_ratio=max_norm_ratio,
            )
            for contexts in (range(n_train), range(n_train, tokens.n_contexts))
        )
        return cls(
            train,
            held_out if tokens.n_held_out else None,
            example=example,
            batch_size=batch_size,
            buffer_rows=buffer_rows,
            seed=seed,
            model_name=model_name,
            tokens=tokens,
        )

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        batch_size: int = 4096,
        seed: int = 0,
        held_out_fraction: float = 0.1,
    ) -> "ActivationStream":
        """Any activations, with no language model.

        Args:
            tensors: {name: [n, d]}, row i being the same sample in each. They are not copied.
            batch_size: Rows in a batch.
            seed: Decides the order of the rows, and which are held out.
            held_out_fraction: Share of the rows that training never sees, from 0 up to 1; at
                least one row, unless it is 0.

        Raises:
            ValueError: The tensors are not aligned floating-point matrices on one device, or
                a number is out of range. While iterating: NaN or infinity.
        """
        check_numbers(batch_size, seed)
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        train_rows, held_out_rows = split_rows(tensors, held_out_fraction, seed)
        return cls(
            TensorSource(tensors, train_rows, batch_size),
            TensorSource(tensors, held_out_rows, batch_size) if len(held_out_rows) else None,
            example=tensors,
            batch_size=batch_size,
            # The source gives its rows in random order already.
            buffer_rows=batch_size,
            seed=seed,
        )

    @classmethod
    def from_store(
        cls,
        folder: str | Path,
        hooks: str | Sequence[str] | None = None,
        *,
        batch_size: int = 4096,
        buffer_rows: int | None = None,
        seed: int = 0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> "ActivationStream":
        """Reads what `cache_activations` wrote; training rows and held-out rows stay apart.

        Blocks of neighbouring rows come in random order across all shards. Of a store that was
        written in the order of the text, rows are mixed within windows of `buffer_rows` besides.
        Seed, epoch and number decide which row it is, so nothing is buffered: rows are copied
        from the memory-mapped shards into the batch, those of one shard side by side. From a URL
        they are fetched a window or a batch at a time, which is held in memory. An int8 store
        gives float32, every other its own dtype.

        Args:
            folder: A path, or a URL that fsspec opens.
            hooks: Names or patterns; None for all hooks of the store. Only these are read.
            batch_size: Rows in a batch.
            buffer_rows: Rows that are mixed with each other. None: 16 batches, and no fewer than
                65,536; or, where rows were stored in random order, none.
            seed: Decides the order.
            storage_options: What the file system of a URL is told.

        Raises:
            FileNotFoundError: There is no store, or a shard of it is missing; it is named.
            ValueError: The store is of another version or damaged, has no rows yet, or lacks
                a hook.
        """
        check_numbers(batch_size, seed)
        if buffer_rows is not None:
            rows_to_mix(batch_size, buffer_rows)
        opened = open_store_sources(
            folder,
            hooks,
            batch_size=batch_size,
            buffer_rows=buffer_rows,
            storage_options=storage_options,
        )
        stream = cls(
            opened.train,
            opened.held_out,
            example=opened.example,
            batch_size=batch_size,
            buffer_rows=buffer_rows,
            seed=seed,
            model_name=opened.index.model,
            tokens=opened.tokens,
        )
        stream.context_size = opened.index.context_size
        stream.prepend_bos = opened.index.prepend_bos
        return stream
