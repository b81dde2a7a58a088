"""Several processes train one bank, one for each GPU; without a GPU, processes on the processor.

    torchrun --nproc-per-node 2 examples/12_many_gpus.py
    torchrun --nproc-per-node 2 examples/12_many_gpus.py bank

The first divides every batch, the second the dictionaries. Both end with the bank of one process
(`python examples/12_many_gpus.py`): by batches up to the order of sums, by dictionaries to the bit.
"""

import sys

import saefeat as sf

parallel = sys.argv[1] if len(sys.argv) > 1 else "data"

# Joins the processes that torchrun started; they talk by NCCL on GPUs, else by gloo.
with sf.process_group() as ranks:
    # Every process makes the same stream, and reads its own part of it.
    truth = sf.SyntheticActivations(n_features=64, d_in=32, density=0.03, seed=0)
    stream = truth.stream(batch_size=1024)
    bank = sf.train(
        stream,
        sf.BatchTopKConfig(k=2),
        expansion_factors=[2],
        seeds=[0, 1],
        n_tokens=400_000,
        parallel=parallel,
        progress=False,
    )
    # Each measures a share of the rows held out, and all get the same report.
    report = sf.measure(bank, stream, n_tokens=20_000, progress=False)
    if ranks.is_first:
        print(f"{ranks.size} processes, which divide the {parallel}")
        for (hook_name, _, seed), sae in bank.items():
            found = sf.metrics.match_features(sae.W_dec, truth.directions).n_found()
            print(f"{hook_name}, seed {seed}: {found} of 64 features found at cosine > 0.9")
        print(report)
