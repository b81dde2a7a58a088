"""Reads and replaces activations at the hook points of a TransformerLens model.

The model is known by duck typing: `hook_dict` names its hook points, and calling it runs it.
That holds for every TransformerLens class of versions 3.9 and 4.x, and keeps TransformerLens
itself out of this room.

Shape letters: b contexts in one forward, s positions in a context, d width of a hook (heads
flattened), n rows.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# Classes that read padded batches, by what they call the mask: HookedTransformer and
# TransformerBridge, then HookedEncoder and HookedEncoderDecoder.
MASK_ARGUMENTS = ("attention_mask", "one_zero_attention_mask")

# [b, head, s, s]: no vector for each position, also where the number of heads happens to be s.
PAIRWISE_HOOKS = ("hook_pattern", "hook_attn_scores")


def resolve_hooks(model: Any, hooks: str | Sequence[str]) -> list[str]:
    """The hook names that `hooks` asks for, each one once, in the order of the request.

    Args:
        model: A TransformerLens model.
        hooks: One or more names or patterns. In a pattern `*`, `?` and `[...]` mean what they
            mean for file names, and `*` crosses dots. What a pattern matches is sorted by
            layer number: "blocks.2" before "blocks.10". Aliases count as names
            ("blocks.0.hook_resid_post" is TransformerBridge's "blocks.0.hook_out").

    Raises:
        ValueError: A name is unknown or a pattern matches nothing; near matches are listed.
    """
    known = list(model.hook_dict)
    resolved: dict[str, None] = {}
    for request in [hooks] if isinstance(hooks, str) else hooks:
        if request in known:
            matches = [request]
        else:
            matches = sorted((n for n in known if fnmatchcase(n, request)), key=natural_order)
        if not matches:
            raise ValueError(_unknown_hook(request, known))
        resolved.update(dict.fromkeys(matches))
    if not resolved:
        raise ValueError("No hook was asked for. Name at least one, or a pattern that matches.")
    return list(resolved)


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
        with suppress(_EveryHookRead), _attached(functions), torch.no_grad():
            _run(self._model, token_ids, attention_mask)
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


def read_activations(
    model: Any,
    token_ids: Int[Tensor, "*b s"],
    hooks: str | Sequence[str],
    *,
    attention_mask: Bool[Tensor, "*b s"] | Int[Tensor, "*b s"] | None = None,
    batch_size: int = 32,
    flatten_heads: bool = False,
) -> dict[str, Float[Tensor, "n _"]]:
    """The activations of every token at every hook, in order.

    Args:
        model: A TransformerLens model.
        token_ids: One context [s], or several [b, s].
        hooks: Names or patterns, see `resolve_hooks`.
        attention_mask: 1 where a position holds a token; the other positions are left out.
            Without it every position counts.
        batch_size: Contexts in one forward.
        flatten_heads: Reads hooks with a head axis as one vector for each position.

    Returns:
        {hook name: [n, d]}: the counted positions of the first context, then of the second,
        the same at every hook. In the model's dtype and on its device.

    Raises:
        ValueError: A hook cannot be read (see `HookReader`), there are no tokens, or the
            batch size is not positive.
    """
    if token_ids.ndim > 2 or token_ids.numel() == 0 or batch_size < 1:
        raise ValueError(
            f"token_ids of shape {list(token_ids.shape)} with batch_size={batch_size} cannot be "
            "read. Give one context [s] or several [b, s], at least one token and a batch size "
            "of at least 1."
        )
    token_ids = torch.atleast_2d(token_ids)
    mask = None if attention_mask is None else torch.atleast_2d(attention_mask)
    reader = HookReader(model, hooks, flatten_heads=flatten_heads)
    counted = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.bool()
    n_rows = int(counted.sum())
    rows: dict[str, Tensor] = {}
    filled = 0
    for ids, counts, part in zip(
        token_ids.split(batch_size),
        counted.split(batch_size),
        [None] * len(token_ids) if mask is None else mask.split(batch_size),
        strict=False,
    ):
        kept = counts.flatten().nonzero().squeeze(1)
        for name, value in reader.read(ids, part).items():
            if name not in rows:
                rows[name] = value.new_empty(n_rows, value.shape[-1])
            selected = value.flatten(0, 1).index_select(0, kept.to(value.device))
            rows[name][filled : filled + len(kept)] = selected
        filled += len(kept)
    return rows


@contextmanager
def replaced_activations(
    model: Any,
    hook_name: str,
    function: Callable[[Tensor, Tensor], Tensor],
    source: str | None = None,
) -> Iterator[None]:
    """While it is open, every forward of `model` goes on with what `function` makes of a hook.

    Args:
        model: A TransformerLens model.
        hook_name: One hook.
        function: Is given the hook's value as [b, s, d], heads flattened, and that of `source`,
            and returns a tensor of the first one's shape, which is converted to the model's
            dtype. It must not change what it is given.
        source: A hook that is reached before; None for `hook_name` itself.

    Raises:
        ValueError: A name is unknown or stands for several hooks, or, in a forward,
            `function` returns another shape or `source` was not reached before.
    """
    name, source_name = (_only_hook(model, one) for one in (hook_name, source or hook_name))
    read: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        read[:] = [value.flatten(2)]

    def replace(value: Tensor, hook: Any) -> Tensor:
        if not read:
            raise ValueError(f"{source_name} is not reached before {name}, which it replaces.")
        given = value.flatten(2)
        replaced = function(given, read.pop())
        if replaced.shape != given.shape:
            raise ValueError(
                f"The replacement at {name} has shape {list(replaced.shape)}, but "
                f"{list(given.shape)} was given. It must return one vector for each position."
            )
        return replaced.to(value.dtype).reshape(value.shape)

    with _attached([(model.hook_dict[source_name], keep), (model.hook_dict[name], replace)]):
        yield


def _only_hook(model: Any, request: str) -> str:
    names = resolve_hooks(model, request)
    if len(names) != 1:
        raise ValueError(f"{request!r} stands for {len(names)} hooks; replace one at a time.")
    return names[0]


class _EveryHookRead(Exception):  # noqa: N818 (it is no error)
    """Ends a forward from inside its deepest hook. Nobody else may raise or catch it."""


@contextmanager
def _attached(functions: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Adds functions to hook points, and takes these and no others off again."""
    handles: list[tuple[Any, Any]] = []
    try:
        for point, function in functions:
            point.add_hook(function)
            # add_hook returns the handle in TransformerLens 4.x and None in 3.9.
            handles.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        # Not model.reset_hooks(): it walks the whole model, and takes the user's hooks too.
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def _run(model: Any, token_ids: Tensor, attention_mask: Tensor | None) -> None:
    device = next(model.parameters()).device
    mask: Mapping[str, Tensor] = {}
    if attention_mask is not None:
        accepted = inspect.signature(model.forward).parameters
        name = next((name for name in MASK_ARGUMENTS if name in accepted), None)
        if name is None:
            raise TypeError(f"A {type(model).__name__} takes no attention mask.")
        mask = {name: attention_mask.to(device, torch.long)}
    model(token_ids.to(device), **mask)


def _refuse_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ValueError(
                f"The model is in training mode with dropout {module.p}, so that its activations "
                "are random. Call model.eval() first."
            )


def natural_order(name: str) -> list[str | int]:
    """A sort key by which "blocks.2" comes before "blocks.10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _unknown_hook(request: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(request, known, n=5, cutoff=0.5)
    message = f"No hook of the model matches {request!r}. "
    message += f"Near matches: {', '.join(near)}." if near else "List them by model.hook_dict."
    if "hook_resid_mid" in request:
        message += (
            " Models whose attention and MLP run in parallel (GPT-NeoX, GPT-J, Phi) have no "
            "hook_resid_mid."
        )
    return message
