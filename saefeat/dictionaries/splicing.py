"""A dictionary in the place of the activations that it reads: for steering and ablation.

Shape letters beyond those of `base`: b contexts, s positions in a context.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from saefeat.activations.replacing import replaced_rows
from saefeat.dictionaries.base import Dictionary
from saefeat.kernels import stock
from saefeat.kernels.codes import Codes

Edit = Callable[[Tensor], Tensor] | Mapping[int, float]
"""Gives codes `[n, d_sae]` for codes `[n, d_sae]`; or says what to set which latents to."""


def spliced(
    dictionary: Dictionary,
    model: Any,
    *,
    edit: Edit | None = None,
    keep_error: bool = False,
    positions: Bool[Tensor, "b s"] | None = None,
    max_norm_ratio: float | None = 10.0,
) -> AbstractContextManager[None]:
    """See `Dictionary.spliced`."""
    if dictionary.reads_several_hooks:
        raise ValueError(
            "A crosscoder cannot be spliced in: it reads later hooks, which know what an earlier "
            "one held before it was replaced. Splice one hook of it: "
            f"crosscoder.layer({next(iter(dictionary.hook_widths))!r}).spliced(model)."
        )
    if not dictionary.hook_name:
        raise ValueError(
            "This dictionary does not say which hook it reads, as its files did not. "
            "Name it: dictionary.with_origin(hook_name=...)."
        )
    changed = _setting(edit, dictionary.d_sae) if isinstance(edit, Mapping) else edit

    def replace(
        target: Float[Tensor, "n d"], rows: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_out"]:
        if rows.shape[1] != dictionary.d_in or target.shape[1] != dictionary.d_out:
            raise ValueError(
                f"The model holds {rows.shape[1]} numbers at {dictionary.hook_name}, and "
                f"{target.shape[1]} where the reconstruction goes; the dictionary reads "
                f"{dictionary.d_in} and gives {dictionary.d_out}. It was trained on "
                f"{dictionary.origin.model_name or 'activations of no known model'}."
            )
        weight = dictionary.W_dec
        codes = dictionary.encode(rows.to(weight))
        if changed is None:
            return target if keep_error else dictionary.decode(codes)
        dense = codes.to_dense()
        # A copy, since an edit may well write in place.
        edited = changed(dense.clone())
        if edited.shape != dense.shape:
            raise ValueError(
                f"The edit returned codes of shape {list(edited.shape)} for codes of shape "
                f"{list(dense.shape)}. It must return a value for each row and latent."
            )
        if not keep_error:
            return _decoded(edited, weight) + dictionary.b_dec
        # What the edit adds, and no more: without one the activations stay as they are.
        return target.to(weight) + _decoded(edited - dense, weight)

    return replaced_rows(
        model,
        dictionary.origin.target_hook_name or dictionary.hook_name,
        replace,
        source=dictionary.hook_name,
        positions=positions,
        max_norm_ratio=max_norm_ratio,
    )


def _decoded(
    codes: Float[Tensor, "n d_sae"], decoder: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "n d_out"]:
    """`codes @ decoder`."""
    # What is 0 has a gradient as well: that of a coefficient to be learned, which starts there.
    if codes.requires_grad:
        return codes @ decoder
    on = Codes.from_dense(codes)
    return stock.product(on.pattern, on.values, decoder)


def _setting(values: Mapping[int, float], d_sae: int) -> Callable[[Tensor], Tensor]:
    """The edit that sets latents to values, everywhere."""
    for latent in values:
        if not 0 <= latent < d_sae:
            raise ValueError(
                f"The edit names latent {latent}, and the dictionary has 0 to {d_sae - 1}."
            )

    def edit(codes: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_sae"]:
        for latent, value in values.items():
            codes[:, latent] = value
        return codes

    return edit
