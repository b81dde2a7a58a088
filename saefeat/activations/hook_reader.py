"""All hooks of a model, or of several, in one forward that ends at the deepest of them.

Shape letters: b contexts in one forward, s positions in a context, d width of a hook (heads
flattened).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saefeat.activations.hook_names import resolve_hooks
from saefeat.activations.hook_points import attached, run_model

# [b, head, s, s]: no vector for each position, also where the number of heads happens to be s.
PAIRWISE_HOOKS = ("hook_pattern", "hook_attn_scores")


class HookReader:
    """Reads all of its hooks in one forward of the model, which it ends as soon as it has them.

    The layers above the deepest hook and the unembedding never run. Values are copied into
    buffers that the next read reuses: ordinary tensors, which may be trained on.
    """

    def __init__(
        self, model: Any, hooks: str | Sequence[str], *, flatten_heads: bool = False
    ) -> None:
        """Finds the hook points; nothing is run yet, and nothing is attached to the model.

        Args:
            model: A TransformerLens model. Hooks that are set on it stay and run, and what
                they change is read changed, provided they were set before.
            hooks: Names or patterns, see `resolve_hooks`.
            flatten_heads: Reads a hook with a head axis, [b, s, head, d_head], as one vector
                for each position, its heads one after the other.

        Raises:
            ValueError: A hook is unknown, or the model has dropout switched on.
        """
        _refuse_dropout(model)
        self.hooks: list[str] = resolve_hooks(model, hooks)
        self.flatten_heads = flatten_heads
        self._model = model
        # Aliases of one hook point share its buffer, under the name that was asked for first.
        hook_dict = model.hook_dict
        first_names: dict[Any, str] = {}
        for name in self.hooks:
            first_names.setdefault(hook_dict[name], name)
        self._points = {name: point for point, name in first_names.items()}
        self._buffer_of = {name: first_names[hook_dict[name]] for name in self.hooks}
        self._buffers: dict[str, Tensor] = {}

    def read(
        self,
        token_ids: Int[Tensor, "b s"],
        attention_mask: Bool[Tensor, "b s"] | Int[Tensor, "b s"] | None = None,
    ) -> dict[str, Float[Tensor, "b s _"]]:
        """The activations at every hook for a batch of contexts.

        Args:
            token_ids: They are moved to the model's device.
            attention_mask: 1 where a position holds a token, 0 where it holds padding.

        Returns:
            {hook name as it was asked for: [b, s, d]} in the model's dtype and on its device,
            valid until the next read. Names of one hook point share one tensor.

        Raises:
            ValueError: A hook gives no vector for each position, has heads while
                `flatten_heads` is off, or does not run exactly once before all others have.
        """
        values: dict[str, Tensor] = {}

        def reading(name: str) -> Callable[..., None]:
            def hook_function(value: Any, hook: Any) -> None:
                if name in values:
                    raise ValueError(
                        f"The hook {name} runs more than once in a forward, as where layers share "
                        "weights: its name does not say which of its values is meant."
                    )
                values[name] = self._copy(name, value, token_ids.shape)
                if len(values) == len(self._points):
                    raise _EveryHookRead

            return hook_function

        functions = [(point, reading(name)) for name, point in self._points.items()]
        # Not inference_mode: a model may keep what it first computes under it (rotary tables),
        # and could not be trained afterwards.
        with suppress(_EveryHookRead), attached(functions), torch.no_grad():
            run_model(self._model, token_ids, attention_mask)
        missing = [name for name in self._points if name not in values]
        if missing:
            raise ValueError(
                f"The hook {missing[0]} did not run in this forward. It may be switched off in "
                "the model (cfg.use_attn_result, use_split_qkv_input, use_hook_mlp_in and the "
                "like), or this architecture may never reach it."
            )
        return {name: values[self._buffer_of[name]] for name in self.hooks}

    def weight_sample(self) -> Float[Tensor, " n"]:
        """A few numbers of every weight of the model, which tell it from another."""
        return torch.cat(
            [one.detach().flatten()[:4].float().cpu() for one in self._model.parameters()]
        )

    def forward_bytes(self, n_contexts: int, n_positions: int) -> int:
        """About the memory that a forward takes for a moment, by the sizes in the model's cfg.

        Of one layer, since no layer outlives its turn: the residual stream with what is normed
        and projected from it (8 vectors), the MLP's hidden units (4), and attention's scores and
        pattern where they are written out. In float32; 0 where the model states no sizes.
        """
        cfg = getattr(self._model, "cfg", None)
        d_model, d_mlp, n_heads = (
            getattr(cfg, name, None) or 0 for name in ("d_model", "d_mlp", "n_heads")
        )
        return 4 * n_contexts * n_positions * (8 * d_model + 4 * d_mlp + 2 * n_heads * n_positions)

    def _copy(self, name: str, value: Any, batch_shape: torch.Size) -> Tensor:
        """Copies one hook's value into its buffer, and gives the part that it fills."""
        n_contexts, n_positions = batch_shape
        self._check_shape(name, value, batch_shape)
        width = value[0, 0].numel()
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or len(buffer) < n_contexts
            or buffer.shape[1:] != (n_positions, width)
            or (buffer.dtype, buffer.device) != (value.dtype, value.device)
        ):
            # A caller's inference mode would make the buffer unfit for training.
            with torch.inference_mode(False):
                buffer = torch.empty(
                    n_contexts, n_positions, width, dtype=value.dtype, device=value.device
                )
            self._buffers[name] = buffer
        filled = buffer[:n_contexts]
        filled.view(value.shape).copy_(value)
        return filled

    def _check_shape(self, name: str, value: Any, batch_shape: torch.Size) -> None:
        is_vectors = (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.ndim >= 3
            and value.shape[:2] == batch_shape
            and not name.endswith(PAIRWISE_HOOKS)
        )
        if not is_vectors:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"The hook {name} holds {shape} for token ids of shape {list(batch_shape)}: not "
                "one vector for each position. Attention patterns and scores, and hooks on "
                "token ids, are no activations that a dictionary can read."
            )
        if value.ndim > 3 and not self.flatten_heads:
            raise ValueError(
                f"The hook {name} holds {list(value.shape)}, with a head axis. Pass "
                "flatten_heads=True to read the heads of a position as one vector of "
                f"{value[0, 0].numel()}."
            )


class ModelsReader:
    """Reads the same contexts through several models, one after the other.

    A hook of the model called "a" is named `<hook>@a`.
    """

    def __init__(self, readers: Mapping[str, HookReader]) -> None:
        """`readers` are those of each model, by a name for it."""
        self._readers = dict(readers)
        self.hooks: list[str] = [
            f"{hook}@{name}" for name, reader in readers.items() for hook in reader.hooks
        ]

    def read(
        self,
        token_ids: Int[Tensor, "b s"],
        attention_mask: Bool[Tensor, "b s"] | Int[Tensor, "b s"] | None = None,
    ) -> dict[str, Float[Tensor, "b s _"]]:
        """As `HookReader.read`, of all models."""
        return {
            f"{hook}@{name}": value
            for name, reader in self._readers.items()
            for hook, value in reader.read(token_ids, attention_mask).items()
        }

    def weight_sample(self) -> Float[Tensor, " n"]:
        """As `HookReader.weight_sample`, of all models."""
        return torch.cat([reader.weight_sample() for reader in self._readers.values()])

    def forward_bytes(self, n_contexts: int, n_positions: int) -> int:
        """As `HookReader.forward_bytes`, of the largest model: they take turns."""
        return max(one.forward_bytes(n_contexts, n_positions) for one in self._readers.values())


class _EveryHookRead(Exception):  # noqa: N818 (it is no error)
    """Ends a forward from inside its deepest hook. Nobody else may raise or catch it."""


def _refuse_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ValueError(
                f"The model is in training mode with dropout {module.p}, so that its activations "
                "are random. Call model.eval() first."
            )
