"""A run described by flags: which model, text, hooks and dictionaries; one pass; one folder."""

from __future__ import annotations

import sysconfig
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # A command line that only shows its help need not wait for torch.
    from saefeat.activations.stream import ActivationStream
    from saefeat.activations.tokens import Tokens
    from saefeat.dictionaries.base import DictionaryConfig
    from saefeat.training.bank import Bank
    from saefeat.training.plan import Plan

Kind = Literal[
    "standard",
    "gated",
    "topk",
    "batch-topk",
    "jumprelu",
    "matryoshka",
    "matching-pursuit",
    "crosscoder",
    "l1-crosscoder",
]
"""Kinds of dictionary by name; see `Job.config_type`."""

RIVALS = {"k": "target_l0", "target_l0": "k"}
"""The two ways to say how many latents are on; a kind has one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What `saefeat plan` costs and `saefeat train` runs."""

    model: str = "smollm2-135m"
    """"smollm2-135m", a Hugging Face name, or the folder of a model."""
    text: Path | None = None
    """A text file or folder. Default: the sources of Python's standard library."""
    hooks: tuple[str, ...] = ("blocks.*.hook_resid_post",)
    """Hook points, or patterns of their names."""
    kind: Kind = "topk"
    """Kind of dictionary; one for each hook, or a crosscoder of all hooks."""
    k: int | None = None
    """Latents on per token, for kinds that keep a number of them. Default: 32."""
    target_l0: float | None = None
    """Latents on per token to steer for, for kinds with a penalty. Default: a fixed penalty."""
    expansion_factors: tuple[float, ...] = (8,)
    """Latents per neuron; one dictionary for each."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights; one dictionary for each."""
    tokens: int = 1_000_000
    """Activations to train on, a row for each token; more than the text has means epochs."""
    batch_size: int = 4096
    """Rows in a step."""
    buffer_rows: int | None = None
    """Rows that are mixed. Default: 16 batches, and no fewer than 65,536."""
    context_size: int = 128
    """Tokens in a context, or as many as the model reads if fewer."""
    learning_rate: float | None = None
    """Peak learning rate of Adam. Default: by width and steps."""
    seed: int = 0
    """Seed of the order of the text."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints, from which --resume goes on."""
    device: str = "auto"
    """"auto" is CUDA where there is one, else "cpu"."""
    parallel: Literal["data", "bank", "features"] = "data"
    """What the processes of torchrun divide: rows of a batch, dictionaries, or their latents."""

    def config(self) -> DictionaryConfig:
        """The recipe of the dictionaries.

        Raises:
            ValueError: An option does not belong to this kind.
        """
        config_type = self.config_type
        known = {field.name for field in fields(config_type)}
        chosen = {
            name: value
            for name in ("k", "target_l0", "learning_rate")
            if (value := getattr(self, name)) is not None
        }
        for name in chosen:
            if name not in known:
                other = RIVALS[name]
                raise ValueError(
                    f"{self.kind} has no {_flag(name)}. Say how many latents are on with "
                    f"{_flag(other)}, or choose another --kind."
                )
        return config_type(**chosen)

    @classmethod
    def of_run(cls, config: str | Path) -> Job:
        """The job of an earlier run, as its `config.json` has it.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or no `saefeat train` wrote it.
        """
        from saefeat.core.files import read_json
        from saefeat.core.records import from_json

        written = read_json(config)
        notes = written.get("notes") if isinstance(written, dict) else None
        job = notes.get("job") if isinstance(notes, dict) else None
        if job is None:
            raise ValueError(
                f"{config} does not say which text was read, since no `saefeat train` wrote it. "
                "Say it by flags: --text, --model and the rest."
            )
        return from_json(cls, job, config)

    @property
    def _as_json(self) -> dict[str, Any]:
        """What `of_run` reads, wherever it is called."""
        from saefeat.models.packaged import SMOLLM2_NAME, TINY_MODELS

        folder = Path(self.model).expanduser()
        # A packaged name wins over a folder, as it does where models are loaded.
        is_folder = self.model not in (SMOLLM2_NAME, *TINY_MODELS) and folder.is_dir()
        return {
            **asdict(self),
            "model": str(folder.resolve()) if is_folder else self.model,
            "text": None if self.text is None else str(self.text.resolve()),
        }

    @property
    def config_type(self) -> type[DictionaryConfig]:
        """The config of `kind`, which is an architecture's name but for its hyphens."""
        from saefeat.dictionaries.registry import ARCHITECTURES

        name = self.kind.replace("-", "_")
        if name == "matching_pursuit":
            name = "matching_pursuit_refit"
        return ARCHITECTURES[name].config_type

    def language_model(self) -> Any:
        """The TransformerLens model, loaded.

        Raises:
            OSError: There is no such model.
        """
        from saefeat.models.load import load_model
        from saefeat.models.packaged import quiet_transformers

        with quiet_transformers():
            return load_model(self.model, device=self.device)

    def stream(self, model: Any = None) -> ActivationStream:
        """The activations, the text tokenised; of `model` if it has been loaded already.

        Raises:
            ValueError: The text is empty, or an option is out of range.
            OSError: There is no such model or text.
        """
        from saefeat.activations.stream import ActivationStream

        if self.tokens < 1:
            raise ValueError(f"--tokens must be 1 or more, got {self.tokens}.")
        if model is None:
            model = self.language_model()
        tokens = read_text(
            self.text, model, n_rows=self.tokens, context_size=self.context_size, seed=self.seed
        )
        return ActivationStream.from_model(
            model,
            tokens,
            hooks=self.hooks,
            batch_size=self.batch_size,
            buffer_rows=self.buffer_rows,
            seed=self.seed,
        )

    def plan(self, stream: ActivationStream, out: Path, *, progress: bool = True) -> Plan:
        """What the run will cost; see `saefeat.plan`."""
        from saefeat.training.plan import plan

        return plan(stream, self.config(), out=out, progress=progress, **self._options)

    def train(
        self, stream: ActivationStream, out: Path, *, resume: bool = False, progress: bool = True
    ) -> Bank:
        """The trained dictionaries, which are in `out` too; see `saefeat.train`."""
        from saefeat.training.trainer import train

        return train(
            stream,
            self.config(),
            out=out,
            resume=resume,
            progress=progress,
            parallel=self.parallel,
            notes={"job": self._as_json},
            **self._options,
        )

    @property
    def _options(self) -> dict[str, Any]:
        """What `saefeat.plan` and `saefeat.train` both take."""
        return {
            "expansion_factors": self.expansion_factors,
            "seeds": self.seeds,
            "n_tokens": self.tokens,
            "checkpoint_every": self.checkpoint_every,
            "device": self.device,
            "log_every": self.log_every,
        }


def read_text(
    text: Path | None,
    model: Any,
    *,
    context_size: int,
    n_rows: int | None = None,
    **options: Any,
) -> Tokens:
    """The tokens of a text for a language model.

    Args:
        text: A text file or folder; None for the sources of Python's standard library.
        model: The TransformerLens model that will read them.
        context_size: Tokens in a context; as many as the model reads if those are fewer.
        n_rows: Rows of activations that they have to be enough for; None for all of the text.
        options: What else `load_tokens` takes.

    Raises:
        ValueError: The text is empty, or an option is out of range.
        OSError: There is no such text.
    """
    from saefeat.activations.tokens import load_tokens

    context_size = min(context_size, model.cfg.n_ctx)
    if n_rows is not None:
        # A tenth is held out, and another is room for BOS, separators and attention sinks.
        options["max_tokens"] = int(1.25 * n_rows) + 2 * context_size
    return load_tokens(
        Path(sysconfig.get_path("stdlib")) if text is None else text,
        tokenizer=model.tokenizer,
        context_size=context_size,
        pattern="**/*.py" if text is None else "**/*",
        **options,
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
