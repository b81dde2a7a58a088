"""The names of a model's hook points: which of them a pattern means, and their order."""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any


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
    return matching_hooks(list(model.hook_dict), hooks, owner="model")


def matching_hooks(known: Sequence[str], hooks: str | Sequence[str], *, owner: str) -> list[str]:
    """`resolve_hooks` among known names; `owner` is what an error calls that which has them."""
    resolved: dict[str, None] = {}
    for request in [hooks] if isinstance(hooks, str) else hooks:
        if request in known:
            matches = [request]
        else:
            matches = sorted((n for n in known if fnmatchcase(n, request)), key=natural_order)
        if not matches:
            raise ValueError(_unknown_hook(request, known, owner))
        resolved.update(dict.fromkeys(matches))
    if not resolved:
        raise ValueError("No hook was asked for. Name at least one, or a pattern that matches.")
    return list(resolved)


def natural_order(name: str) -> list[str | int]:
    """A sort key by which "blocks.2" comes before "blocks.10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _unknown_hook(request: str, known: Sequence[str], owner: str) -> str:
    near = difflib.get_close_matches(request, known, n=5, cutoff=0.5)
    message = f"No hook of the {owner} matches {request!r}. "
    if near:
        message += f"Near matches: {', '.join(near)}."
    else:
        message += f"It has {len(known)}, such as {', '.join(known[:5])}."
    if "hook_resid_mid" in request:
        message += (
            " Models whose attention and MLP run in parallel (GPT-NeoX, GPT-J, Phi) have no "
            "hook_resid_mid."
        )
    return message
