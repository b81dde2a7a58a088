"""What a run starts from: blank dictionaries, or copies of trained ones."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from saefeat.activations.stream import ActivationStream
from saefeat.dictionaries.base import Dictionary, DictionaryConfig, Origin
from saefeat.dictionaries.registry import dictionary_type
from saefeat.training.bank import Bank, Key


def copies(stream: ActivationStream, bank: Bank) -> dict[Key, Dictionary]:
    """Dictionaries of a bank, ready to be trained further on `stream`.

    Raises:
        ValueError: The stream lacks a hook of the bank, or has it in another width.
    """
    for key, dictionary in bank.items():
        widths = dictionary.origin.hook_widths or {
            key[0]: dictionary.d_in,
            bank.targets[key]: dictionary.d_out,
        }
        for hook_name, width in widths.items():
            if stream.widths.get(hook_name) != width:
                raise ValueError(
                    f"The dictionary {key} has width {width} at {hook_name}, where the stream "
                    f"has {stream.widths.get(hook_name, 'nothing')}. Make the stream with the "
                    "hooks of the bank, on the model that it was trained on."
                )
    copied = {key: copy.deepcopy(one).float().requires_grad_(True) for key, one in bank.items()}
    for (hook_name, expansion_factor, seed), one in copied.items():
        one.with_origin(hook_name=hook_name, expansion_factor=expansion_factor, seed=seed)
    return copied


def blank_dictionaries(
    stream: ActivationStream,
    config: DictionaryConfig,
    expansion_factors: Sequence[float],
    seeds: Sequence[int],
    targets: Mapping[str, str] | None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[Key, Dictionary]:
    """One dictionary for every hook or group, expansion factor and seed, its weights all 0.

    Under `torch.device("meta")` they take no memory.

    Raises:
        ValueError: An option names a value twice or none, a hook that the stream lacks, or a width
            below 1; or the kind of dictionary has no use for it.
    """
    for name, values in (("expansion_factors", expansion_factors), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} must name each value once and at least one, got {values}.")
    kind = dictionary_type(config)
    origins = (
        _of_groups(stream, kind, targets, groups)
        if kind.reads_several_hooks
        else _of_hooks(stream, kind, targets, groups)
    )
    dictionaries = {}
    for origin in origins:
        widths = list((origin.hook_widths or {}).values()) or [stream.widths[origin.hook_name]]
        target = origin.target_hook_name
        for expansion_factor in expansion_factors:
            mean_width = sum(widths) / len(widths)
            d_sae = round(expansion_factor * mean_width)
            if d_sae < 1:
                raise ValueError(
                    f"Expansion factor {expansion_factor:g} gives {origin.hook_name} (width "
                    f"{mean_width:g}) {expansion_factor * mean_width:g} latents. It must be at "
                    f"least {1 / mean_width:.2g}."
                )
            for seed in seeds:
                own = replace(origin, expansion_factor=expansion_factor, seed=seed)
                d_out = None if target is None else stream.widths[target]
                key = (origin.hook_name, expansion_factor, seed)
                dictionaries[key] = kind(config, sum(widths), d_sae, own, d_out)
    return dictionaries


def group_name(hooks: Sequence[str]) -> str:
    """What a group of hooks is called that was given no name: its first hook to its last.

    "a+b" of two, "a+b+c" of three, "a+...+z" of more.
    """
    return "+".join(hooks if len(hooks) <= 3 else (hooks[0], "...", hooks[-1]))


def _of_hooks(
    stream: ActivationStream,
    kind: type[Dictionary],
    targets: Mapping[str, str] | None,
    groups: Mapping[str, Sequence[str]] | None,
) -> list[Origin]:
    """What the dictionaries of one hook or transcoder have in common, for each."""
    if groups is not None:
        raise ValueError(
            f"groups are for crosscoders, and a {kind.__name__} reads one hook. Leave them out, or "
            "pass a CrosscoderConfig."
        )
    for hook_name in {*(targets or {}).keys(), *(targets or {}).values()}:
        if hook_name not in stream.hooks:
            raise ValueError(
                f"targets names {hook_name!r}, which the stream does not read; it reads "
                f"{', '.join(stream.hooks)}. Make the stream with both hooks of each transcoder."
            )
    if targets is None:
        return [_origin(stream, hook_name) for hook_name in stream.hooks]
    return [
        replace(_origin(stream, hook_name), target_hook_name=target)
        for hook_name, target in targets.items()
    ]


def _of_groups(
    stream: ActivationStream,
    kind: type[Dictionary],
    targets: Mapping[str, str] | None,
    groups: Mapping[str, Sequence[str]] | None,
) -> list[Origin]:
    """What the crosscoders of each group have in common."""
    if targets is not None:
        raise ValueError(
            f"targets are for transcoders; a {kind.__name__} reconstructs what it reads. Name its "
            "hooks in groups."
        )
    origins = []
    for name, patterns in (groups or {group_name(stream.hooks): stream.hooks}).items():
        if isinstance(patterns, str):
            raise ValueError(f"The group {name!r} is one text; give a list of hooks or patterns.")
        hooks = dict.fromkeys(
            hook for pattern in patterns for hook in _matching(stream, name, pattern)
        )
        if not hooks or "/" in name or (name in stream.hooks and list(hooks) != [name]):
            raise ValueError(
                f"A group needs at least one hook, and a name without a slash that no other hook "
                f"has, got {name!r} of {list(hooks)}."
            )
        widths = {hook: stream.widths[hook] for hook in hooks}
        origins.append(replace(_origin(stream, name), hook_widths=widths))
    return origins


def _matching(stream: ActivationStream, group: str, pattern: str) -> list[str]:
    """The hooks of the stream that a pattern stands for, in the order of the stream."""
    if pattern in stream.hooks:
        return [pattern]
    found = [hook for hook in stream.hooks if fnmatchcase(hook, pattern)]
    if not found:
        raise ValueError(
            f"The group {group!r} names {pattern!r}, which the stream does not read; it reads "
            f"{', '.join(stream.hooks)}."
        )
    return found


def _origin(stream: ActivationStream, hook_name: str) -> Origin:
    return Origin(
        hook_name=hook_name,
        model_name=stream.model_name,
        context_size=stream.context_size,
        prepend_bos=stream.prepend_bos,
    )
