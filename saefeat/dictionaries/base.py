"""What every dictionary is: a way to encode activations sparsely, and rows that decode them.

Shape letters used in this room: n rows (tokens), d_in input width, d_out width of what is
reconstructed (d_in again, but for transcoders), d_sae latents, nnz stored entries of sparse codes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saefeat.core.html import table
from saefeat.core.hub import OnHub
from saefeat.dictionaries.costs import Costs
from saefeat.dictionaries.step import StepContext, StepLoss
from saefeat.kernels import stock
from saefeat.kernels.codes import Codes

if TYPE_CHECKING:
    from saefeat.dictionaries.splicing import Edit


@dataclass(frozen=True, kw_only=True, slots=True)
class DictionaryConfig:
    """The recipe that every kind of dictionary shares; each kind adds its own fields."""

    learning_rate: float | None = None
    """Peak learning rate of Adam. None: by width and steps, see `training.schedules`."""
    short_run_rate: float = 4e-3
    """What None means in a run of up to 1,000 steps of 2,048 tokens; see `training.schedules`."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises from 0, 1,000 steps at most."""
    decay_fraction: float = 0.2
    """Share of the steps over which the learning rate falls to 0 at the end."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's running means of the gradient and of its square."""
    dead_after_tokens: int | None = None
    """Tokens without firing after which a latent counts as dead during training.
    None: 10 million, or a twentieth of a run that is shorter than 200 million tokens."""
    freeze_decoder: bool = False
    """Leave the decoder rows at the directions that they start at, and train the rest. A control:
    random directions explain much of the variance too (Korznikov et al. 2026, arXiv:2602.14111)."""
    freeze_offset: bool = False
    """Leave b_dec where it starts, at the geometric median of the first rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a dictionary comes from: what SAELens calls metadata."""

    hook_name: str = ""
    """The hook point that it reads; of a crosscoder, the name of its set of hooks."""
    hook_widths: dict[str, int] | None = None
    """The hooks that a crosscoder reads side by side, and the width of each; else None."""
    target_hook_name: str | None = None
    """The hook point that a transcoder predicts; None for a dictionary of what it reads."""
    model_name: str | None = None
    """The language model; None for activations of no known model."""
    expansion_factor: float | None = None
    """d_sae / d_in as it was asked for; a crosscoder's d_in is the mean width of its hooks."""
    seed: int | None = None
    """Seed of its initial weights."""
    context_size: int | None = None
    """Tokens in a context of the training text."""
    prepend_bos: bool | None = None
    """Whether each context began with a BOS token."""
    n_tokens: int = 0
    """Rows of activations that it was trained on."""


class Dictionary(OnHub, Costs, nn.Module, ABC):
    """A sparse dictionary over the activations of one hook point.

    Weights are held latent by latent, `[d_sae, d_out]`, since every sparse product reads or
    writes whole rows of them. A dictionary that training hands out reads raw activations of the
    model: the factor by which they were scaled during training is folded into its weights.

    Args:
        config: Its recipe.
        d_in: Width of what it reads.
        d_sae: Number of latents.
        origin: Where it comes from.
        d_out: Width of what a transcoder predicts; None for a dictionary of what it reads.

    Raises:
        ValueError: A width is below 1, or a number of the config is out of range.
    """

    architecture: ClassVar[str]
    """Its name in files and reports."""
    config_type: ClassVar[type[DictionaryConfig]]
    """The config that makes one."""
    restarts_dead_latents: ClassVar[bool] = True
    """Whether training points dead latents at what is badly reconstructed (`restart`)."""

    reads_several_hooks: ClassVar[bool] = False
    """Whether it reads a set of hooks side by side, as crosscoders do."""
    rate_factors: ClassVar[dict[str, float]] = {}
    """Parameters that learn faster or slower than the learning rate, and by what factor."""

    def __init__(
        self,
        config: DictionaryConfig,
        d_in: int,
        d_sae: int,
        origin: Origin | None = None,
        d_out: int | None = None,
    ) -> None:
        super().__init__()
        self.is_transcoder = d_out is not None
        self.d_out = d_in if d_out is None else d_out
        if d_in < 1 or d_sae < 1 or self.d_out < 1:
            raise ValueError(
                f"A dictionary needs widths of at least 1, got d_in={d_in}, d_out={self.d_out} "
                f"and d_sae={d_sae}. An expansion factor below 1 / d_in gives no latents."
            )
        self.config = config
        self.origin = origin or Origin()
        self.d_in = d_in
        self.d_sae = d_sae
        self.W_dec = nn.Parameter(torch.zeros(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.set_up()

    def set_up(self) -> None:
        """Check what a kind asks of its config, and add its own weights, at construction."""
        config = self.config
        rates = (config.learning_rate, config.short_run_rate)
        if not all(rate is None or rate >= 0 for rate in rates):
            raise ValueError(f"A learning rate must not be negative, got {rates}.")
        fractions = (config.warmup_fraction, config.decay_fraction)
        if not all(0 <= fraction <= 1 for fraction in fractions):
            raise ValueError(
                f"warmup_fraction and decay_fraction must be from 0 to 1, got {fractions}."
            )
        patience = config.dead_after_tokens
        if patience is not None and patience < 1:
            raise ValueError(f"dead_after_tokens must be at least 1, got {patience}.")

    @property
    def hook_name(self) -> str:
        """The hook point that it reads; of a crosscoder, the name of its set of hooks."""
        return self.origin.hook_name

    @property
    def hook_widths(self) -> dict[str, int]:
        """The hook points that it reads, side by side where they are several, by width."""
        return self.origin.hook_widths or {self.hook_name: self.d_in}

    @property
    def mean_width(self) -> float:
        """Mean width of the hooks that it reads, to which expansion factors refer."""
        return self.d_in / len(self.hook_widths)

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """What a unit of each latent adds to the reconstruction: the length of its row."""
        norms: Tensor = torch.linalg.vector_norm(self.W_dec, dim=1)
        return norms

    @torch.no_grad()
    def initialise(
        self,
        generator: torch.Generator,
        centre: Float[Tensor, " d_out"],
        sample: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"],
    ) -> None:
        """Draw unit decoder rows and start the decoder bias at `centre`, that of the target.

        `sample` and `target` hold scaled activations; a dictionary of what it reads gets the
        same twice.
        """
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator))
        self.b_dec.copy_(centre)

    def balanced(self, rows: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Rows in units in which every hook of a crosscoder weighs alike; else as they are."""
        return rows

    @abstractmethod
    def encode(self, x: Float[Tensor, "..."]) -> Codes:
        """The sparse codes of activations; `x` is cast to the dictionary's dtype.

        Raises:
            ValueError: `x` is not a matrix of width `d_in`.
        """

    def decode(self, codes: Codes) -> Float[Tensor, "n d_out"]:
        """`codes @ W_dec + b_dec`.

        Raises:
            ValueError: The codes are of another number of latents.
        """
        if codes.d_sae != self.d_sae:
            raise ValueError(
                f"These codes have {codes.d_sae} latents and this dictionary has {self.d_sae}. "
                "Decode codes with the dictionary that made them."
            )
        return stock.product(codes.pattern, codes.values, self.W_dec) + self.b_dec

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "n d_out"]:
        """`decode(encode(x))`."""
        return self.decode(self.encode(x))

    @abstractmethod
    def training_loss(
        self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], context: StepContext
    ) -> StepLoss:
        """The loss of one batch of scaled activations, ready for `backward`."""

    @torch.no_grad()
    def restart(
        self,
        latents: Int[Tensor, " m"],
        directions: Float[Tensor, "m d_out"],
        x: Float[Tensor, "m d_in"],
    ) -> None:
        """Begin latents anew at unit `directions`, what is missing from the rows of `x`."""
        self.W_dec[latents] = directions

    @torch.no_grad()
    def fold_scale(self, scale: float, target_scale: float) -> None:
        """Turn what predicts `target_scale * target` from `scale * x` into what needs no scales.

        The same latents are on, `target_scale` times as weak, so that decoder rows keep their
        length. The two are one number unless this is a transcoder.
        """
        self.b_dec.div_(target_scale)

    def fold_scales(self, scales: Sequence[float]) -> None:
        """`fold_scale` with the scales of what it reads and of what it reconstructs."""
        self.fold_scale(*scales)

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Bring decoder rows to length 1 with outputs as they were, before training further.

        Raises:
            ValueError: A row is 0, so that it has no direction.
        """
        norms = self.W_dec.norm(dim=1, keepdim=True)
        if (norms == 0).any():
            raise ValueError(
                f"{int((norms == 0).sum())} decoder rows of the dictionary of "
                f"{self.hook_name!r} are 0, so that it cannot be trained further."
            )
        self.W_dec.div_(norms)

    @torch.no_grad()
    def drop_parallel_gradient(self) -> None:
        """Remove the part of the decoder's gradient that would only change its rows' length."""
        gradient = self.W_dec.grad
        if gradient is not None:
            along = torch.einsum("hd,hd->h", gradient, self.W_dec)
            gradient.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring decoder rows back to length 1, as rounding and Adam's scaling move them."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @property
    def sae_lens_architecture(self) -> str:
        """The architecture that its files name, for SAELens to open it as."""
        return self.architecture

    @property
    def sae_lens_fields(self) -> dict[str, object]:
        """Keys that SAELens wants in `cfg.json` for this kind, beyond those of all kinds."""
        return {}

    def file_tensors(self) -> dict[str, Tensor]:
        """Its weights by SAELens's names."""
        return {"W_dec": self.W_dec, "b_dec": self.b_dec}

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take over weights by SAELens's names; `file_tensors` says which there must be."""
        for name, own in self.file_tensors().items():
            if name in tensors:
                own.copy_(tensors[name])

    def save(self, folder: str | Path) -> Path:
        """Write the dictionary into a new folder, as one that SAELens opens too; gives the folder.

        Raises:
            FileExistsError: The folder already holds files.
            ValueError: A weight is not finite.
        """
        from saefeat.dictionaries import sae_lens

        return sae_lens.save(self, Path(folder))

    @classmethod
    def _opened(cls, folder: Path) -> "Dictionary":
        from saefeat.dictionaries.loading import load_dictionary

        return load_dictionary(folder)

    def spliced(
        self,
        model: Any,
        *,
        edit: "Edit | None" = None,
        keep_error: bool = False,
        positions: Bool[Tensor, "b s"] | None = None,
        max_norm_ratio: float | None = 10.0,
    ) -> AbstractContextManager[None]:
        """While it is open, every forward of `model` goes on with this reconstruction.

            with sae.spliced(model, edit={17: 8.0}, keep_error=True):
                logits = model(ids)

        The rows at `hook_name` are replaced by `decode(edit(encode(x)))`; a transcoder replaces
        those at its target. Gradients flow through, also through the edit (not to the input of
        matching pursuit). Dictionaries at several hooks can be open at once. Hooks are taken off
        at the end, whatever happens.

        Args:
            model: A TransformerLens model (HookedTransformer, TransformerBridge, ...), the
                dictionary being on any device.
            edit: A function of the codes, dense `[n, d_sae]` (a latent that is off is a zero
                that can be set), which may change them in place and returns them; or
                `{latent: value}`, which sets latents at every row: 0 ablates, more steers.
            keep_error: Adds what the dictionary does not explain, `x - decode(encode(x))`, so
                that only the edit changes the model and nothing does without one.
            positions: Which positions of a forward are replaced; None for all. Pass
                `tokens.counts` to spare what was left out of training, BOS above all.
            max_norm_ratio: Rows whose norm is above this many times the median of the forward
                are spared too, as in training (attention sinks); None replaces them.

        Raises:
            ValueError: This is a crosscoder, the model lacks its hook, or an edit names a latent
                that it lacks; in a forward, the hook has another width, the edit returns another
                shape, or `positions` does not fit.
        """
        from saefeat.dictionaries.splicing import spliced

        return spliced(
            self,
            model,
            edit=edit,
            keep_error=keep_error,
            positions=positions,
            max_norm_ratio=max_norm_ratio,
        )

    def with_origin(self, **changes: object) -> "Dictionary":
        """This dictionary, its origin changed in place."""
        self.origin = replace(self.origin, **changes)  # type: ignore[arg-type]
        return self

    def _repr_html_(self) -> str:
        origin = {
            name: value for name, value in asdict(self.origin).items() if value not in (None, "")
        }
        facts = {"d_in": self.d_in, "d_out": self.d_out, "d_sae": self.d_sae}
        return table(
            f"{type(self).__name__} of {self.hook_name or 'an unnamed hook'}",
            (),
            [*facts.items(), *origin.items(), *asdict(self.config).items()],
        )

    def extra_repr(self) -> str:
        predicted = f" -> {self.origin.target_hook_name!r}" if self.is_transcoder else ""
        return f"{self.hook_name!r}{predicted}, d_in={self.d_in}, d_sae={self.d_sae}"

    def _checked(self, x: Tensor) -> Float[Tensor, "n d_in"]:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(
                f"This dictionary of {self.hook_name or 'an unnamed hook'} reads [n, {self.d_in}], "
                f"got {list(x.shape)}. Flatten batch and position first, and check that the "
                "activations are of the hook that the dictionary was trained on."
            )
        return x.to(self.W_dec.dtype)


def random_unit_rows(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Directions drawn evenly from the sphere."""
    rows = torch.randn(n, d, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1)
