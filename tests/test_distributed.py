"""Several processes end with what one would have ended with, and end together if one fails."""

import json
import os
import signal
import time

import pytest
import torch
from processes import KilledError, results, together
from resumable_run import BATCH_SIZE, CONFIGS, make_stream, run
from tiny_models import VOCABULARY, save_tiny_llama, tiny_model

import saefeat as sf
from saefeat.activations.hook_reader import HookReader
from saefeat.activations.store_source import StoreSource
from saefeat.cli import main
from saefeat.core.distributed import PeerLostError, current
from saefeat.dictionaries.topk import TopK
from saefeat.kernels import eager
from saefeat.kernels.shared_selection import batch_top_k, top_k
from saefeat.superposition.joint_features import JointFeatures
from saefeat.training.bank_learner import BankLearner
from saefeat.training.sharded_bank import owners

pytestmark = pytest.mark.usefixtures("selects_in_float32")


def state_of(bank):
    return {key: one.state_dict() for key, one in bank.items()}


def trained(stream, architecture, out=None, **options):
    """The weights that a run ends with, here or in each of several processes."""
    return state_of(run(out, stream, architecture, kernels="stock", **options))


def assert_same(states, expected):
    assert list(states) == list(expected)
    for key, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, states[key][name]), (key, name)


def assert_close(states, expected, tolerance=1e-5):
    assert list(states) == list(expected)
    for key, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                states[key][name], tensor, atol=tolerance, rtol=tolerance, msg=f"{key} {name}"
            )


@pytest.mark.parametrize("architecture", CONFIGS)
def test_divided_batches_train_every_kind_as_whole_ones_do(architecture, tmp_path):
    stream = make_stream("tensors", 0)
    expected = trained(stream, architecture, n_steps=8)
    first, second = results(tmp_path, lambda: trained(stream, architecture, n_steps=8))
    assert_same(second, first)
    assert_close(first, expected)


def test_the_last_row_may_be_one_alone(tmp_path):
    stream = make_stream("tensors", 0)
    # 70 rows in the last batch but one, and one in the last.
    n_tokens = 3 * BATCH_SIZE + 1
    options = {"expansion_factors": [2], "n_tokens": n_tokens, "progress": False}
    options["kernels"] = "stock"
    config = sf.BatchTopKConfig(k=4)
    expected = state_of(sf.train(stream, config, **options))
    first, second, third = results(
        tmp_path, lambda: state_of(sf.train(stream, config, **options)), size=3
    )
    assert_same(second, first)
    assert_same(third, first)
    assert_close(first, expected)


@pytest.mark.parametrize("parallel", ["data", "bank"])
def test_a_language_model_reads_a_share_in_each_process(parallel, monkeypatch, tmp_path):
    stream = make_stream("live", 0)
    plain, reads = HookReader.read, []
    monkeypatch.setattr(HookReader, "read", lambda *args: (reads.append(1), plain(*args))[1])

    def train_and_count(**options):
        reads.clear()
        states = trained(stream, "topk", n_steps=6, **options)
        return states, len(reads), stream.left_out

    expected, n_alone, left_out = train_and_count()
    outcomes = results(tmp_path, lambda: train_and_count(parallel=parallel))
    for states, n_reads, counts in outcomes:
        assert_close(states, expected, 1e-5 if parallel == "data" else 0.0)
        assert counts == left_out
        assert n_reads <= n_alone // 2 + 2
    # Each chunk by one of them, and at the end perhaps one for nothing.
    assert n_alone <= sum(n_reads for _, n_reads, _ in outcomes) <= n_alone + 1


def test_a_store_is_read_in_parts(tmp_path):
    sf.cache_activations(make_stream("live", 0), tmp_path / "store", progress=False)
    stream = make_stream("store", 0, tmp_path / "store")
    expected = trained(stream, "topk", n_steps=6)
    read = []
    plain = StoreSource.shuffled_rows

    def counting(source, seed, epoch, start, stop, *rest):
        read.append(stop - start)
        return plain(source, seed, epoch, start, stop, *rest)

    def train_and_count():
        StoreSource.shuffled_rows = counting
        return trained(stream, "topk", n_steps=6), sum(read), stream.left_out

    for states, n_read, left_out in results(tmp_path, train_and_count):
        assert_close(states, expected)
        assert n_read == (6 * BATCH_SIZE - 30) / 2
        assert left_out == stream.left_out


@pytest.mark.parametrize("size", [2, 4])
def test_a_divided_bank_is_that_of_one_process_to_the_last_bit(size, tmp_path):
    stream = make_stream("tensors", 0)
    for architecture in ("batch_topk", "jumprelu"):
        expected = trained(stream, architecture)
        for states in results(
            tmp_path, lambda name=architecture: trained(stream, name, parallel="bank"), size=size
        ):
            assert_same(states, expected)


def test_crosscoders_and_transcoders_come_out_alike(tmp_path):
    stream = make_stream("tensors", 0)
    options = {"expansion_factors": [2], "n_tokens": 600, "progress": False, "kernels": "stock"}
    for config, more in (
        (sf.CrosscoderConfig(k=4), {"groups": {"all": ["*"]}}),
        (sf.L1CrosscoderConfig(initial_l0=8), {"groups": {"all": ["*"]}}),
        (sf.JumpReLUConfig(sparsity_loss="tanh_quadratic", initial_l0=8), {}),
        (sf.BatchTopKConfig(k=4), {"targets": {"a": "b"}}),
    ):
        expected = state_of(sf.train(stream, config, **options, **more))
        for states in results(
            tmp_path,
            lambda config=config, more=more: state_of(sf.train(stream, config, **options, **more)),
        ):
            assert_close(states, expected)


def test_owners_have_about_as_much_to_do_and_keep_hooks_together():
    def bank(n_hooks, factors):
        with torch.device("meta"):
            return {
                (f"h{i}", f, 0): TopK(sf.TopKConfig(k=1), 8, int(8 * f))
                for i in range(n_hooks)
                for f in factors
            }

    owner = owners(bank(6, (2, 4)), 3)
    assert [list(owner.values()).count(rank) for rank in range(3)] == [4, 4, 4]
    assert all(owner[f"h{i}", 2, 0] == owner[f"h{i}", 4, 0] for i in range(6))
    # Fewer hooks than processes: one by one, the largest by itself.
    assert owners(bank(1, (1, 2, 16)), 2) == {
        ("h0", 1, 0): 1,
        ("h0", 2, 0): 1,
        ("h0", 16, 0): 0,
    }
    with pytest.raises(ValueError, match="bank of 2 dictionaries cannot be divided among 3"):
        owners(bank(1, (1, 2)), 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "case", ["even", "all in one process", "many equal", "few positive", "none positive"]
)
def test_the_largest_scores_of_all_are_found_exactly(dtype, case, tmp_path):
    n, d_sae, n_kept, size = 37, 24, 111, 3
    scores = torch.randn(n, d_sae, generator=torch.Generator().manual_seed(0))
    if case == "all in one process":
        scores[13:] -= 100
    if case == "many equal":
        scores = scores.mul(2).round()
    if case == "few positive":
        scores = torch.where(scores > 2, scores, -scores.abs())
    if case == "none positive":
        scores = -scores.abs() - 1
    scores = scores.to(dtype)
    pattern, least = eager.batch_top_k(scores, n_kept)
    expected = torch.zeros(n, d_sae).index_put((pattern.rows, pattern.latents), torch.ones(()))

    def select():
        part = current().part(n)
        own, found = batch_top_k(eager, scores[part], n_kept, current())
        mask = torch.zeros(part.stop - part.start, d_sae)
        return mask.index_put((own.rows, own.latents), torch.ones(())), found

    outcomes = results(tmp_path, select, size=size)
    assert torch.equal(torch.cat([mask for mask, _ in outcomes]), expected)
    assert all(torch.equal(found, least) for _, found in outcomes)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
@pytest.mark.parametrize("size", [2, 4])
def test_divided_latents_train_as_whole_dictionaries_do(architecture, size, tmp_path):
    stream = make_stream("tensors", 0)
    expected = trained(stream, architecture, n_steps=8)
    options = {"n_steps": 8, "parallel": "features"}
    outcomes = results(tmp_path, lambda: trained(stream, architecture, **options), size=size)
    for states in outcomes:
        assert_same(states, outcomes[0])
        assert_close(states, expected)


def test_more_latents_than_one_process_has_are_kept_at_the_start(tmp_path):
    stream = make_stream("tensors", 0)
    options = {"expansion_factors": [1], "n_tokens": 500, "progress": False, "kernels": "stock"}
    for kind in (sf.TopKConfig, sf.BatchTopKConfig):
        config = kind(k=4, k_start_factor=3, k_anneal_fraction=0.5)  # 12 of 16, and 8 here
        expected = state_of(sf.train(stream, config, **options))
        for states in results(
            tmp_path,
            lambda config=config: state_of(
                sf.train(stream, config, **options, parallel="features")
            ),
        ):
            assert_close(states, expected)


@pytest.mark.parametrize("case", ["distinct", "many equal", "one process has all"])
def test_the_largest_latents_of_a_row_are_found_and_never_more(case, tmp_path):
    n, d_sae, k = 29, 24, 5
    scores = torch.randn(n, d_sae, generator=torch.Generator().manual_seed(0))
    if case == "many equal":
        scores = scores.round()
    if case == "one process has all":
        scores[:, 8:] -= 100

    def select():
        part = current().part(d_sae)
        pattern = top_k(eager, scores[:, part], k, current())
        mask = torch.zeros(n, part.stop - part.start)
        return mask.index_put((pattern.rows, pattern.latents), torch.ones(()))

    kept = torch.cat(results(tmp_path, select, size=3), dim=1)
    assert (kept.sum(1) == k).all()
    # The values kept are the largest; which of equal ones is of no account.
    expected = scores.topk(k, dim=1).values
    assert torch.equal(torch.where(kept > 0, scores, -torch.inf).topk(k, dim=1).values, expected)


def test_latents_that_cannot_be_divided_are_refused(tmp_path):
    stream = make_stream("tensors", 0)
    for config, message in (
        (sf.StandardConfig(), "divides the latents of TopK and BatchTopK dictionaries"),
        (sf.TopKConfig(k=17), "do not make 3 equal parts of at least k=17"),
    ):

        def begin(config=config):
            return sf.train(
                stream, config, expansion_factors=[3], n_tokens=100, parallel="features"
            )

        for outcome in together(tmp_path, begin, size=3):
            assert isinstance(outcome, ValueError)
            assert message in str(outcome)


def crash_at(number, crash, rank=None):
    """Makes the training step with a number end in `crash`, in one process or all."""
    plain = BankLearner.step

    def step(self, *args):
        if self.step_number == number and rank in (None, current().rank):
            crash()
        return plain(self, *args)

    BankLearner.step = step


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise RuntimeError("a step failed")


@pytest.mark.parametrize(("parallel", "dies"), [("data", 1), ("bank", 0), ("features", 1)])
def test_one_that_is_killed_ends_all_and_any_number_goes_on(parallel, dies, tmp_path):
    stream = make_stream("live", 0)
    expected = trained(stream, "batch_topk", n_steps=12)
    out = tmp_path / "run"

    def begin():
        crash_at(5, die, dies)
        return trained(stream, "batch_topk", out, n_steps=12, parallel=parallel)

    began = time.monotonic()
    outcomes = together(tmp_path, begin)
    assert time.monotonic() - began < 60
    assert isinstance(outcomes[dies], KilledError)
    assert isinstance(outcomes[1 - dies], PeerLostError)
    assert "resume=True" in str(outcomes[1 - dies])

    def go_on():
        crash_at(9, fail)
        return trained(stream, "batch_topk", out, n_steps=12, parallel=parallel)

    for outcome in together(tmp_path, go_on, size=4):
        assert str(outcome) == "a step failed"
    assert (out / "checkpoints" / "step-000000008").is_dir()
    tolerance = 0.0 if parallel == "bank" else 1e-5
    assert_close(trained(stream, "batch_topk", out, n_steps=12), expected, tolerance)

    # What has ended is handed to every process, with the origin of its dictionaries.
    written = sf.Bank.load(out)

    def finished():
        bank = run(out, stream, "batch_topk", n_steps=12, kernels="stock", parallel=parallel)
        return state_of(bank), {one.origin for one in bank.values()}

    for states, origins in results(tmp_path, finished):
        assert_same(states, {key: written[key].state_dict() for key in states})
        assert origins == {one.origin for one in written.values()}


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(tmp_path):
    stream = make_stream("tensors", 0)

    def begin():
        crash_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM), 1)
        return trained(stream, "topk", tmp_path / "run", parallel="bank")

    for outcome in together(tmp_path, begin):
        assert isinstance(outcome, KeyboardInterrupt)
        assert "SIGTERM before step" in str(outcome)
    assert_same(trained(stream, "topk", tmp_path / "run"), trained(stream, "topk"))


def test_an_error_of_the_first_is_raised_in_all(tmp_path):
    stream = make_stream("tensors", 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    begin = lambda: run(tmp_path / "run", stream, "topk", resume=False)  # noqa: E731
    for outcome in together(tmp_path, begin):
        assert isinstance(outcome, FileExistsError)


def test_processes_that_ask_for_different_runs_are_refused(tmp_path):
    def begin():
        return trained(make_stream("tensors", current().rank), "topk")

    for outcome in together(tmp_path, begin):
        assert isinstance(outcome, ValueError)
        assert "Process 1 was asked for another run than the first: its stream" in str(outcome)


def test_where_one_has_no_more_batches_all_end(tmp_path):
    stream = make_stream("tensors", 0)

    def begin():
        plain = stream.batches
        if current().rank == 1:
            stream.batches = lambda n_rows, *rest, **more: plain(5 * BATCH_SIZE, *rest, **more)
        return trained(stream, "topk")

    first, second = together(tmp_path, begin)
    assert "After step 5 process 0 of 2 has a batch and another has none" in str(first)
    assert "After step 5 process 1 of 2 has no batch and another has one" in str(second)


def test_reports_are_those_of_one_process(tmp_path):
    stream = make_stream("live", 0)
    bank = run(None, stream, "topk", n_steps=3, kernels="stock")
    model = tiny_model("bridge of GPT-2")
    options = {"n_tokens": 101, "model": model, "ce_tokens": 240, "progress": False}
    expected = sf.measure(bank, stream, **options)
    for report in results(tmp_path, lambda: sf.measure(bank, stream, **options)):
        assert report.n_tokens == expected.n_tokens
        for row, one in zip(report.rows, expected.rows, strict=True):
            assert row.l0 == one.l0
            assert row.n_alive == one.n_alive
            assert row.fvu == pytest.approx(one.fvu, rel=1e-12)
            assert row.normalized_mse == pytest.approx(one.normalized_mse, rel=1e-12)
            assert row.effective_features == pytest.approx(one.effective_features, rel=1e-9)
            assert row.ce_loss_recovered == pytest.approx(one.ce_loss_recovered, rel=1e-5)
        for name, density in expected.densities.items():
            assert torch.equal(report.densities[name], density)


def test_the_profile_of_a_crosscoder_is_that_of_one_process(tmp_path):
    stream = make_stream("tensors", 0)
    options = {"expansion_factors": [2], "n_tokens": 600, "progress": False, "kernels": "stock"}
    bank = sf.train(stream, sf.CrosscoderConfig(k=4), groups={"all": ["*"]}, **options)
    (one,) = bank.values()
    with torch.no_grad():  # so that there are copies to be counted
        one.encoder[1].copy_(one.encoder[0])
        one.W_dec[1].copy_(one.W_dec[0])

    def measured():
        (row,) = sf.measure(bank, stream, n_tokens=101, progress=False).rows
        ranks, features = current(), JointFeatures(one)
        for batch in stream.held_out_batches(101):
            x = torch.cat(list(batch.values()), dim=1)
            x = x[ranks.part(len(x))]
            codes = one.encode(x)
            features.update(codes, x, one.decode(codes))
        features.add_up(ranks)
        return row, features.costs, features.stands_for

    expected, costs, stands_for = measured()
    assert stands_for[:2].unique().numel() == 1
    for row, own_costs, own_stands_for in results(tmp_path, measured):
        assert row.fvu_by_hook == pytest.approx(expected.fvu_by_hook, rel=1e-9)
        assert row.layer_profile == expected.layer_profile
        torch.testing.assert_close(own_costs, costs)
        assert torch.equal(own_stands_for, stands_for)


def test_the_commands_share_their_work(tmp_path, capfd):
    save_tiny_llama(tmp_path / "model")
    for number in range(20):
        words = [f"w{3 + (i * i + number * i) % (VOCABULARY - 3)}" for i in range(200)]
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    described = ["--model", tmp_path / "model", "--text", tmp_path, "--context-size", "16"]
    described += ["--hooks", "blocks.[02].hook_resid_post", "--kind", "batch-topk", "--k", "4"]
    described += ["--expansion-factors", "2", "--tokens", "600", "--batch-size", "100"]
    out = tmp_path / "run"

    def command(*arguments):
        main([str(argument) for argument in arguments])

    trains = ["train", *described, "--parallel", "bank", "--out", out]
    assert results(tmp_path / "outcomes", command, *trains) == [None, None]
    assert capfd.readouterr().out.count("Bank of 2 dictionaries") == 1
    assert json.loads((out / "config.json").read_text())["processes"] == 2
    assert results(tmp_path / "outcomes", command, "measure", out, "--tokens", "200") == [None] * 2
    assert capfd.readouterr().out.count("Report: ") == 1
    assert len(sf.Report.load(out / "report").rows) == 2
    for refused in together(tmp_path / "outcomes", command, "report", out):
        assert refused.code == 2
    assert "saefeat report runs in one process, and torchrun started 2" in capfd.readouterr().err


def test_one_that_hangs_ends_all(tmp_path):
    stream = make_stream("tensors", 0)

    def begin():
        crash_at(2, lambda: time.sleep(8), 1)
        return trained(stream, "topk")

    for outcome in together(tmp_path, begin, timeout=3):
        assert isinstance(outcome, PeerLostError)


def test_tensors_of_any_dtype_travel_whole(tmp_path):
    sent = {
        "flag": torch.tensor([True]),
        "number": torch.tensor(7),
        "rows": torch.arange(6.0).view(2, 3).to(torch.bfloat16),
        "none": torch.empty(0, 4),
    }
    for received in results(
        tmp_path, lambda: current().tensors_of(1, sent if current().rank == 1 else None)
    ):
        assert list(received) == list(sent)
        for name, tensor in sent.items():
            assert received[name].dtype == tensor.dtype
            assert torch.equal(received[name], tensor)
