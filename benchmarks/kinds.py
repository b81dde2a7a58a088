"""The kinds of dictionary by one name, here and in SAELens."""

from typing import Any

import saefeat as sf

CONFIGS = {
    "topk": sf.TopKConfig,
    "batch_topk": sf.BatchTopKConfig,
    "matryoshka": sf.MatryoshkaConfig,
    "standard": sf.StandardConfig,
    "gated": sf.GatedConfig,
    "jumprelu": sf.JumpReLUConfig,
    "matching_pursuit": sf.MatchingPursuitConfig,
}
"""The kinds of one hook; `crosscoder.py` has those of several."""
PENALTY = {"standard": 1.5, "gated": 2.5, "jumprelu": 3.0}
"""Coefficients that SAELens is given, of the kinds whose sparsity comes from a penalty. On
SmolLM2 its L0 came out from 7 (jumprelu) to 32 (standard)."""


def sae_lens_config(kind: str, d_in: int, d_sae: int, k: int, *, warm_up_steps: int = 0) -> Any:
    """SAELens's own config for `kind`, at its defaults but for what is matched.

    Args:
        kind: One of `CONFIGS`.
        d_in: Width of the activations.
        d_sae: Latents.
        k: Latents on per token, of the kinds that are told; atoms that are picked at most.
        warm_up_steps: Steps over which a penalty rises.
    """
    import sae_lens

    shared: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "normalize_activations": "expected_average_only_in",
    }
    if kind == "topk":
        return sae_lens.TopKTrainingSAEConfig(k=k, **shared)
    if kind == "batch_topk":
        return sae_lens.BatchTopKTrainingSAEConfig(k=k, **shared)
    if kind == "matryoshka":
        widths = [round(share * d_sae) for share in (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)]
        return sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
            k=k, matryoshka_widths=widths, **shared
        )
    if kind == "standard":
        return sae_lens.StandardTrainingSAEConfig(
            l1_coefficient=PENALTY[kind], l1_warm_up_steps=warm_up_steps, **shared
        )
    if kind == "gated":
        return sae_lens.GatedTrainingSAEConfig(
            l1_coefficient=PENALTY[kind], l1_warm_up_steps=warm_up_steps, **shared
        )
    if kind == "jumprelu":
        return sae_lens.JumpReLUTrainingSAEConfig(
            l0_coefficient=PENALTY[kind], l0_warm_up_steps=warm_up_steps, **shared
        )
    if kind == "matching_pursuit":
        return sae_lens.MatchingPursuitTrainingSAEConfig(
            max_iterations=k, decoder_init_norm=1.0, **shared
        )
    raise ValueError(f"kind must be one of {', '.join(CONFIGS)}, got {kind!r}.")


def sae_lens_dictionary(kind: str, d_in: int, d_sae: int, k: int, *, warm_up_steps: int = 0) -> Any:
    """SAELens's own class for `kind`, as `sae_lens_config` describes it."""
    from sae_lens.registry import get_sae_training_class

    config = sae_lens_config(kind, d_in, d_sae, k, warm_up_steps=warm_up_steps)
    return get_sae_training_class(config.architecture())[0](config)
