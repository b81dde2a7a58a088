"""What a plan predicts, against runs and closed forms; and what does not fit, is refused."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import WIDTH, tiny_model, token_ids

import saefeat as sf
from saefeat.core import memory
from saefeat.dictionaries.registry import KINDS
from saefeat.training import checkpoint
from saefeat.training import plan as planning
from saefeat.training.bank_learner import BankLearner
from saefeat.training.fitting import readable_bytes
from saefeat.training.requirements import Requirements

TESTS = Path(__file__).parent
CONFIG = sf.TopKConfig(k=4)


def tensor_stream(*, hooks=2, width=16, batch_size=256, rows=2000):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"hook{i}": torch.randn(rows, width, generator=generator) for i in range(hooks)}
    return sf.ActivationStream.from_tensors(tensors, batch_size=batch_size)


def text_stream(hooks="blocks.*.hook_resid_post", **options):
    tokens = sf.load_tokens(token_ids(400, 16), prepend_bos=False)
    return sf.ActivationStream.from_model(
        tiny_model("HookedTransformer"), tokens, hooks, max_norm_ratio=None, **options
    )


def plan(stream, config=CONFIG, **options):
    return sf.plan(stream, config, **{"n_tokens": 2000, "progress": False, **options})


# What a run takes, beside the run itself


RUNS = {
    "tensors, TopK": (
        "tensor_stream(hooks=2, width=256, batch_size=1024, rows=4000)",
        "sf.TopKConfig(dead_after_tokens=10**7)",
        {"expansion_factors": [8, 16], "seeds": [0, 1], "n_tokens": 3000},
    ),
    "tensors, JumpReLU": (
        "tensor_stream(hooks=1, width=256, batch_size=2048, rows=8000)",
        "sf.JumpReLUConfig()",
        {"expansion_factors": [24], "n_tokens": 6000},
    ),
    "tensors, crosscoder": (
        "tensor_stream(hooks=4, width=256, batch_size=1024, rows=4000)",
        "sf.CrosscoderConfig(dead_after_tokens=10**7)",
        {"expansion_factors": [16], "seeds": [0, 1], "n_tokens": 3000},
    ),
    "tensors, L1 crosscoder": (
        "tensor_stream(hooks=4, width=256, batch_size=1024, rows=4000)",
        "sf.L1CrosscoderConfig()",
        {"expansion_factors": [16], "n_tokens": 3000},
    ),
    "tensors, matching pursuit": (
        "tensor_stream(hooks=2, width=128, batch_size=1024, rows=4000)",
        "sf.MatchingPursuitConfig(k=4)",
        {"expansion_factors": [32], "n_tokens": 2000},
    ),
    "a model, TopK": (
        "text_stream(batch_size=256)",
        "sf.TopKConfig(dead_after_tokens=10**7)",
        {"expansion_factors": [1024], "seeds": [0, 1], "n_tokens": 600},
    ),
}

SCRIPT = """
import json
import saefeat as sf
from test_plan import peak_bytes, tensor_stream, text_stream
stream, config, options = {stream}, {config}, {options}
planned = sf.plan(stream, config, progress=False, **options).to_dict()
sf.train(stream, config, progress=False, **options)
print(json.dumps([planned, peak_bytes()]))
"""


def peak_bytes():
    """The most memory that this process has had, since it became the program that it is.

    Not `ru_maxrss` where there is another way: on Linux a process inherits it from its parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return 1024 * int(line.group(1))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(scope="module")
def machine_code_on_disk():
    """Compiled once, since the compiler takes more memory than a small run."""
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    stream = sf.ActivationStream.from_tensors({"x": x}, batch_size=100)
    for kind in KINDS:
        fields = kind.config_type.__dataclass_fields__
        config = kind.config_type(**({"k": 2} if "k" in fields else {"initial_l0": 4}))
        sf.train(stream, config, expansion_factors=[6], n_tokens=200, progress=False)


@pytest.mark.parametrize("run", RUNS)
def test_the_peak_memory_of_a_run_is_within_a_fifth_of_the_plan(run, machine_code_on_disk):
    stream, config, options = RUNS[run]
    # In a process of its own, as nothing else tells the most that a run had.
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(stream=stream, config=config, options=options)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    )
    assert finished.returncode == 0, finished.stderr
    planned, peak = json.loads(finished.stdout)
    already = planned["host_parts"]["process and model"]
    assert planned["peak_host_bytes"] == pytest.approx(peak, rel=0.2)
    # What the process holds anyway would hide errors in the rest; libraries may still grow a bit.
    rest = peak - already
    assert planned["peak_host_bytes"] - already == pytest.approx(rest, rel=0.25, abs=40e6)


def test_the_disk_that_a_run_takes_is_what_was_planned(tmp_path):
    stream, out = tensor_stream(), tmp_path / "run"
    options = {"expansion_factors": [8, 16], "n_tokens": 5000, "log_every": 1}
    planned = plan(stream, out=out, **options).disk_bytes
    sf.train(stream, CONFIG, out=out, progress=False, **options)
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert planned == pytest.approx(written, rel=0.2)


def test_the_disk_that_checkpoints_take_is_planned_at_its_fullest(monkeypatch, tmp_path):
    stream, out, most = tensor_stream(), tmp_path / "run", [0]
    options = {"expansion_factors": [8], "n_tokens": 5000, "checkpoint_every": 2}
    planned = plan(stream, out=out, **options).disk_bytes
    publish = checkpoint.publish_folder

    def measured(draft, path):
        publish(draft, path)
        files = [path for path in out.rglob("*") if path.is_file()]
        most[0] = max(most[0], sum(path.stat().st_size for path in files))

    monkeypatch.setattr(checkpoint, "publish_folder", measured)
    sf.train(stream, CONFIG, out=out, progress=False, **options)
    assert planned == pytest.approx(most[0], rel=0.25)


# Closed forms


def test_weights_are_counted_as_the_trained_bank_has_them():
    stream = tensor_stream()
    options = {"expansion_factors": [0.5, 4], "seeds": [0, 1]}
    bank = sf.train(stream, CONFIG, n_tokens=256, progress=False, **options)
    planned = plan(stream, **options)
    counted = sum(p.numel() for one in bank.values() for p in one.parameters())
    assert planned.n_parameters == counted
    assert planned.n_dictionaries == len(bank) == 8


@pytest.mark.parametrize(
    ("config", "flops_per_row"),
    [
        # 16 wide and 64 latents: the dense product, and ten numbers' work for an entry and width.
        (sf.TopKConfig(k=4), 2 * 16 * 64 + 4 * 10 * 16),
        (sf.BatchTopKConfig(k=3), 2 * 16 * 64 + 3 * 10 * 16),
        (sf.StandardConfig(initial_l0=8), 2 * 16 * 64 + 8 * 10 * 16),
        (sf.GatedConfig(initial_l0=8), 2 * 16 * 64 + 8 * 14 * 16),
        # Gram matrix once for 256 rows.
        (
            sf.MatchingPursuitConfig(k=3),
            2 * 16 * 64 + 2 * 16 * 64**2 / 256 + 64 * (9 + 15) + 4 * 3 * 16,
        ),
    ],
)
def test_flops_of_dictionaries_have_a_closed_form(config, flops_per_row):
    planned = plan(tensor_stream(hooks=1), config, expansion_factors=[4])
    assert planned.dictionary_flops == pytest.approx(2000 * flops_per_row)
    assert planned.language_model_flops == 0


def test_flops_of_the_model_are_those_of_the_layers_below_the_hook():
    per_layer = 4 * 2 * WIDTH * WIDTH + 2 * 2 * WIDTH * 64 + 2 * 2 * 16 * WIDTH
    planned = plan(text_stream("blocks.1.hook_resid_post"))
    assert planned.language_model_flops == pytest.approx(2000 * 2 * per_layer)


def test_a_row_is_counted_at_every_hook():
    planned = plan(tensor_stream(hooks=3))
    assert planned.activation_bytes == 2000 * 3 * 16 * 4
    assert planned.n_steps == math.ceil(2000 / 256)


# Times


def test_expected_time_is_the_sum_over_rows_steps_and_hooks(monkeypatch):
    stream = tensor_stream(hooks=3)
    chunks, _, _ = planning.measure_reading(stream)
    monkeypatch.setattr(planning, "measure_reading", lambda stream: (chunks, 0.5, 7.0))
    monkeypatch.setattr(planning, "measure_steps", lambda *arguments: (10.0, 2.0))
    planned = plan(stream, n_tokens=2560)
    assert planned.language_model_seconds == 0.5 * 2560
    assert planned.dictionary_seconds == 3 * (10.0 + 2.0 * 10)
    assert planned.wall_seconds == planned.language_model_seconds + planned.dictionary_seconds
    assert planned.language_model_flops == 7.0 * 2560


class CountingLearner(BankLearner):
    def __init__(self):
        self.n_steps = 0

    def step(self, batch):
        self.n_steps += 1
        return {}


def test_the_first_step_is_told_apart_and_the_median_step_counts(monkeypatch):
    seconds = iter([9.0, 3.0, 50.0, 4.0])
    monkeypatch.setattr(planning, "timed", lambda call, device: (call(), next(seconds)))
    learner = CountingLearner()
    first, step = planning.measure_steps(learner, {}, torch.device("cpu"))
    assert (first, step) == (5.0, 4.0)
    assert learner.n_steps == 1 + planning.WARM_UP_STEPS + planning.TIMED_STEPS


def test_only_hooks_that_differ_are_timed(monkeypatch):
    timed = []
    tensors = {"a": torch.randn(999, 8), "b": torch.randn(999, 8), "c": torch.randn(999, 12)}
    stream = sf.ActivationStream.from_tensors(tensors, batch_size=64)
    monkeypatch.setattr(
        planning, "measure_steps", lambda learner, *rest: timed.append(learner) or (0.0, 1.0)
    )
    planned = plan(stream, n_tokens=640)
    assert [list(learner.learners) for learner in timed] == [["a"], ["c"]]
    assert planned.dictionary_seconds == 3 * 10


def test_a_sample_of_chunks_leaves_the_stream_as_it_was():
    stream = text_stream(batch_size=64)
    before = [batch["blocks.0.hook_resid_post"] for batch in stream.batches(640)]
    counts = stream.left_out
    assert len(list(stream.sample_chunks(2))) == 2
    assert stream.left_out is counts
    after = [batch["blocks.0.hook_resid_post"] for batch in stream.batches(640)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


# What a plan accepts and gives


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.architecture)
def test_every_kind_has_a_plan_that_json_can_hold(kind):
    config = kind.config_type(**({"k": 4} if "k" in kind.config_type.__dataclass_fields__ else {}))
    planned = plan(tensor_stream(), config, expansion_factors=[4])
    assert json.loads(json.dumps(planned.to_dict()))["n_dictionaries"] == (
        1 if kind.reads_several_hooks else 2
    )
    assert sum(planned.host_parts.values()) == planned.peak_host_bytes
    assert min(planned.host_parts.values()) > 0
    assert planned.peak_device_bytes is None or torch.cuda.is_available()
    assert readable_bytes(planned.peak_host_bytes) in str(planned)


def test_transcoders_and_trained_banks_have_plans():
    stream = tensor_stream()
    targets = {"hook0": "hook1"}
    assert plan(stream, targets=targets).n_dictionaries == 1
    bank = sf.train(stream, CONFIG, n_tokens=256, progress=False)
    weights = bank["hook0", 8, 0].W_dec.clone()
    assert plan(stream, bank).n_dictionaries == 2
    assert torch.equal(bank["hook0", 8, 0].W_dec, weights)


# What does not fit


def requirements(stream, config=CONFIG, **options):
    everything = {"expansion_factors": [8], "seeds": [0], "targets": None, "n_tokens": 2000}
    return Requirements.of(
        stream,
        config,
        log_every=10,
        groups=None,
        checkpoint_every=500,
        keep_last=2,
        device=torch.device("cpu"),
        **{**everything, **options},
    )


def needed(*arguments, **options):
    return sum(requirements(*arguments, **options).host_parts.values())


@pytest.fixture
def refusal(monkeypatch):
    """The message with which a run is refused where no more than `limit` bytes are free."""

    def message(limit, stream, **options):
        monkeypatch.setattr(memory, "available_host_bytes", lambda: int(limit))
        with pytest.raises(ValueError) as refused:
            plan(stream, **options)
        return str(refused.value)

    return message


def test_too_large_a_batch_names_the_batch_that_fits(refusal):
    def stream(batch_size):
        return tensor_stream(hooks=1, batch_size=batch_size, rows=40_000)

    limit = needed(stream(16_384)) * 0.3
    message = refusal(limit, stream(16_384))
    (batch_size,) = map(int, re.findall(r"batch_size=(\d+)", message))
    assert plan(stream(batch_size)).n_steps == math.ceil(2000 / batch_size)
    assert "batch_size" in refusal(limit, stream(2 * batch_size))


def test_too_large_a_buffer_names_the_buffer_that_fits(refusal):
    def stream(buffer_rows):
        return text_stream(batch_size=32, buffer_rows=buffer_rows, contexts_per_forward=4)

    limit = needed(stream(5000), expansion_factors=[1]) * 0.8
    message = refusal(limit, stream(5000), expansion_factors=[1])
    assert "shuffle buffer" in message
    (buffer_rows,) = map(int, re.findall(r"buffer_rows=(\d+)", message))
    assert plan(stream(buffer_rows), expansion_factors=[1]).buffer_bytes < limit
    refusal(limit, stream(2 * buffer_rows), expansion_factors=[1])


def test_too_many_hooks_are_to_be_trained_a_few_at_a_time(refusal):
    limit = needed(tensor_stream(hooks=6), expansion_factors=[128]) * 0.6
    message = refusal(limit, tensor_stream(hooks=6), expansion_factors=[128])
    assert "weights, gradients, Adam" in message
    ((n_hooks, of),) = re.findall(r"(\d) of the (\d) hooks at a time", message)
    assert of == "6"
    assert plan(tensor_stream(hooks=int(n_hooks)), expansion_factors=[128]).n_dictionaries > 0
    refusal(limit, tensor_stream(hooks=int(n_hooks) + 1), expansion_factors=[128])


def test_one_dictionary_that_is_too_wide_names_the_width_that_fits(refusal):
    stream = tensor_stream(hooks=1)
    limit = needed(stream, expansion_factors=[512]) * 0.4
    message = refusal(limit, stream, expansion_factors=[512])
    (factor,) = re.findall(r"expansion_factors=\[([\d.]+)\]", message)
    assert plan(stream, expansion_factors=[float(factor)]).n_dictionaries == 1


def test_where_one_option_is_not_enough_two_are_named(refusal):
    stream = tensor_stream(hooks=2)
    # The widths of trained dictionaries are what they are.
    options = {"expansion_factors": [64], "seeds": [0, 1, 2]}
    bank = sf.train(stream, CONFIG, n_tokens=256, progress=False, **options)
    limit = needed(tensor_stream(hooks=1), expansion_factors=[64]) * 1.05
    message = refusal(limit, stream, config=bank)
    assert "1 of the 2 hooks at a time, in several runs and 1 of the 3 seeds" in message
    one = sf.Bank({("hook0", 64, 0): bank["hook0", 64, 0]})
    assert plan(tensor_stream(hooks=1), one).n_dictionaries == 1


def test_where_nothing_helps_that_is_said(refusal):
    assert "No option makes it fit" in refusal(100, tensor_stream())


def test_too_small_a_disk_is_refused_with_what_fits(monkeypatch, tmp_path):
    stream, out = tensor_stream(hooks=1), tmp_path / "run"
    whole = requirements(stream, expansion_factors=[4, 8]).disk_bytes
    monkeypatch.setattr(memory, "available_disk_bytes", lambda folder: whole - 1000)
    with pytest.raises(ValueError, match=r"expansion_factors=\[4\].*another disk"):
        sf.train(stream, CONFIG, expansion_factors=[4, 8], n_tokens=2000, out=out, progress=False)
    assert not out.exists()
    assert plan(stream, expansion_factors=[4], out=out).disk_bytes < whole
    # A run that writes nothing needs no disk.
    assert plan(stream, expansion_factors=[4, 8]).disk_bytes == whole


def test_a_run_beyond_all_memory_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    stream = tensor_stream(width=256)
    before = memory.process_bytes()
    # Two dictionaries of 210 GB each.
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 64 * 10**9)
    with pytest.raises(ValueError, match=r"take 4\d\d GB of host memory"):
        sf.train(stream, CONFIG, expansion_factors=[100_000], n_tokens=2000, out=tmp_path / "run")
    assert memory.process_bytes() - before < 100e6
    assert not (tmp_path / "run").exists()


def test_the_check_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 0)
    stream = tensor_stream()
    with pytest.raises(ValueError, match="are free"):
        sf.train(stream, CONFIG, n_tokens=256, progress=False)
    assert len(sf.train(stream, CONFIG, n_tokens=256, progress=False, check_memory=False)) == 2


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 500000\n")
    names = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"), "inactive_file")
    monkeypatch.setattr(memory, "CGROUPS", (names,))
    assert memory.available_host_bytes() == 2_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_host_bytes() > 2_500_000


@pytest.mark.parametrize(
    ("n_bytes", "words"), [(999, "999 B"), (1.5e6, "1.5 MB"), (40e12, "40 TB"), (5e15, "5,000 TB")]
)
def test_bytes_are_written_in_the_largest_unit(n_bytes, words):
    assert readable_bytes(n_bytes) == words
