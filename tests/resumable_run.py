"""A run for `test_resume` to kill: `python resumable_run.py OUT LIVE ARCHITECTURE SEED`.

It begins in OUT, or goes on there, writes a checkpoint every two steps, and prints "ended" once
its dictionaries are on disk.
"""

import sys
from pathlib import Path
from typing import Any

import torch

import saefeat as sf

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
CONFIGS = {
    "topk": sf.TopKConfig(k=4, dead_after_tokens=200),
    "batch_topk": sf.BatchTopKConfig(k=4, dead_after_tokens=200),
    "standard": sf.StandardConfig(target_l0=4, initial_l0=8, dead_after_tokens=200),
    "gated": sf.GatedConfig(target_l0=4, initial_l0=8, dead_after_tokens=200),
    "jumprelu": sf.JumpReLUConfig(target_l0=4, initial_l0=8, dead_after_tokens=200),
    "matryoshka": sf.MatryoshkaConfig(k=4, dead_after_tokens=200),
    "matching_pursuit_refit": sf.MatchingPursuitConfig(k=4, dead_after_tokens=200),
}
BATCH_SIZE, N_STEPS = 100, 20
EVERY = 2


def make_stream(kind: str, seed: int, folder: Path | None = None) -> sf.ActivationStream:
    """A small stream of more than one epoch in a run: "live", "tensors" or from a "store"."""
    if kind == "live":
        from tiny_models import tiny_model, token_ids

        tokens = sf.load_tokens(token_ids(120, 12, seed=seed))
        return sf.ActivationStream.from_model(
            tiny_model("bridge of GPT-2"),
            tokens,
            HOOKS,
            batch_size=BATCH_SIZE,
            buffer_rows=300,
            contexts_per_forward=5,
            seed=seed,
        )
    if kind == "store":
        return sf.ActivationStream.from_store(folder, batch_size=BATCH_SIZE, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(900, 6, generator=generator) @ torch.randn(6, 16, generator=generator)
    tensors = {"a": rows + 0.1 * torch.randn(900, 16, generator=generator), "b": rows.relu()}
    return sf.ActivationStream.from_tensors(tensors, batch_size=BATCH_SIZE, seed=seed)


def run(
    out: Path | None,
    stream: sf.ActivationStream,
    architecture: str,
    resume: bool = True,
    n_steps: int = N_STEPS,
    **options: Any,
) -> sf.Bank:
    return sf.train(
        stream,
        CONFIGS[architecture],
        expansion_factors=[2],
        seeds=[0, 1],
        n_tokens=BATCH_SIZE * n_steps - 30,
        out=out,
        checkpoint_every=EVERY,
        resume=resume and out is not None,
        log_every=1,
        progress=False,
        **options,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, source, name, number = sys.argv[1:]
    stream = make_stream(source, int(number))
    print("begins", flush=True)
    run(Path(place), stream, name)
    print("ended", flush=True)
