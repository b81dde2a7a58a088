"""Models of the zoo: what a training step costs, and whether loss goes with size as Kaplan has it.

    python benchmarks/zoo.py step --out benchmarks/results/zoo_step.csv
    python benchmarks/zoo.py sizes --out benchmarks/results/zoo_sizes.csv

`step` has, for the shapes A and B, seconds of one step (4,096 tokens, one thread) by the compiled
decoder and by transformers' GPT-2 with torch.optim.AdamW, both in bfloat16 where that is faster
(autocast for transformers), taking turns; `ratio` is the median over the rounds of theirs over
ours.

`sizes` trains models of one aspect ratio and several sizes on equally many tokens, and prints the
power law through their losses (Kaplan et al. 2020, eq. 1.1). Models are kept in the cache folder.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import tyro
from machine import in_turn, ratio, where, write_row

from saefeat.core.devices import fastest_dtype
from saefeat.models.zoo import A, B, Shape, TrainingOptions, budget, load_text, train_family
from saefeat.models.zoo.corpus import tokenised
from saefeat.models.zoo.optimisation import Optimisation
from saefeat.superposition.theory import FittedLaw

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step, beside transformers."""

    out: Path = Path("zoo_step.csv")
    rounds: int = 15
    contexts: int = 64

    def run(self) -> None:
        torch.set_num_threads(1)
        options = replace(TrainingOptions(), contexts_per_step=self.contexts)
        corpus = tokenised(load_text())
        for shape in (A, B):
            ours = Optimisation(shape, corpus, seed=0, options=options.resolved(shape))
            windows = corpus.windows(options.context_size, 0)
            theirs = _Transformers(shape, options.context_size)
            seconds = in_turn(
                {
                    "ours": lambda _, ours=ours: ours.step(1.0),
                    "theirs": lambda n, theirs=theirs, windows=windows: theirs.step(
                        *windows.batch(n, self.contexts)
                    ),
                },
                rounds=self.rounds,
                warm_up=3,
                device=CPU,
            )
            write_row(
                self.out,
                where(CPU)
                | {
                    "shape": shape.label,
                    "tokens": self.contexts * options.context_size,
                    "seconds": round(median(seconds["ours"]), 4),
                    "transformers_seconds": round(median(seconds["theirs"]), 4),
                    "ratio": round(ratio(seconds["theirs"], seconds["ours"]), 2),
                },
            )


class _Transformers:
    def __init__(self, shape: Shape, context_size: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=shape.n_layers,
            n_embd=shape.d_model,
            n_head=shape.n_heads,
            n_positions=context_size,
            vocab_size=257,
            tie_word_embeddings=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        self.model = GPT2LMHeadModel(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.is_rounded = fastest_dtype(CPU) == torch.bfloat16

    def step(self, ids: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_rounded):
            logits = self.model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Losses of several sizes, and the law through them."""

    out: Path = Path("zoo_sizes.csv")
    parameters: tuple[int, ...] = (13_824, 27_648, 55_296, 110_592, 221_184)
    aspect_ratio: float = 12
    seeds: tuple[int, ...] = (0, 1)
    tokens: int = TrainingOptions().n_tokens
    processes: int | None = None

    def run(self) -> None:
        shapes = [
            one.shape
            for n in self.parameters
            for one in budget(n, aspect_ratios=[self.aspect_ratio])
        ]
        options = replace(TrainingOptions(), n_tokens=self.tokens)
        family = train_family(
            shapes, self.seeds, options, equal_loss=False, processes=self.processes
        )
        for model in family.equal_tokens:
            write_row(
                self.out,
                where(CPU)
                | {
                    "shape": model.shape.label,
                    "parameters": model.shape.n_parameters,
                    "seed": model.seed,
                    "tokens": model.n_tokens,
                    "validation_loss": round(model.validation_loss, 4),
                },
            )
        sizes = [model.shape.n_parameters for model in family.equal_tokens]
        print(FittedLaw.of(sizes, [model.validation_loss for model in family.equal_tokens]))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"step": Step, "sizes": Sizes}).run()
