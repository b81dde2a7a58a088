"""What a run starts from: blank dictionaries, or copies of trained ones."""

import copy
from collections.abc import Mapping, Sequence

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
        for hook_name, width in (
            (key[0], dictionary.d_in),
            (bank.targets[key], dictionary.d_out),
        ):
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
) -> dict[Key, Dictionary]:
    """One dictionary for every hook or target, expansion factor and seed, its weights all 0.

    Under `torch.device("meta")` they take no memory.

    Raises:
        ValueError: An option names a value twice or none, a hook that the stream lacks, or a width
            below 1.
    """
    for name, values in (("expansion_factors", expansion_factors), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} must name each value once and at least one, got {values}.")
    for hook_name in {*(targets or {}).keys(), *(targets or {}).values()}:
        if hook_name not in stream.hooks:
            raise ValueError(
                f"targets names {hook_name!r}, which the stream does not read; it reads "
                f"{', '.join(stream.hooks)}. Make the stream with both hooks of each transcoder."
            )
    kind = dictionary_type(config)
    dictionaries = {}
    for hook_name in stream.hooks if targets is None else targets:
        target = None if targets is None else targets[hook_name]
        d_in = stream.widths[hook_name]
        for expansion_factor in expansion_factors:
            d_sae = round(expansion_factor * d_in)
            if d_sae < 1:
                raise ValueError(
                    f"Expansion factor {expansion_factor:g} gives {hook_name} (width {d_in}) "
                    f"{expansion_factor * d_in:g} latents. It must be at least {1 / d_in:.2g}."
                )
            for seed in seeds:
                origin = Origin(
                    hook_name=hook_name,
                    target_hook_name=target,
                    model_name=stream.model_name,
                    expansion_factor=expansion_factor,
                    seed=seed,
                    context_size=stream.context_size,
                    prepend_bos=stream.prepend_bos,
                )
                key = (hook_name, expansion_factor, seed)
                d_out = None if target is None else stream.widths[target]
                dictionaries[key] = kind(config, d_in, d_sae, origin, d_out)
    return dictionaries
