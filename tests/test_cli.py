"""The command line as a shell sees it: exit codes, one line on an error, and files at the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_models import VOCABULARY, save_tiny_llama

import saefeat as sf
from saefeat.cli import COMMANDS, main
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.crosscoder import Crosscoder
from saefeat.dictionaries.matching_pursuit import MatchingPursuit
from saefeat.dictionaries.registry import KINDS
from saefeat.dictionaries.topk import TopK
from saefeat.exporting import export
from saefeat.job import Job, Kind
from saefeat.measuring import measure_run

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        words = [f"w{3 + (i * i + number * i) % (VOCABULARY - 3)}" for i in range(200)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def saefeat(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "saefeat", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=cwd,
    )


def test_the_demo_writes_dictionaries_and_a_report_and_says_where(local_model, text, tmp_path):
    out = tmp_path / "out"
    options = ("--model", local_model, "--text", text, "--layers", 3, "--tokens", 3000)
    finished = saefeat("demo", *options, "--out", out)
    assert finished.returncode == 0, finished.stderr
    report = sf.Report.load(out / "report")
    assert [row.layer for row in report.rows] == [0, 1, 2]
    assert str(report) in finished.stdout
    assert "not a count of features" in finished.stdout
    assert f"{out}/report/report.json" in finished.stdout
    assert set(sf.Bank.load(out / "run")) == {(row.hook_name, 4.0, 0) for row in report.rows}
    assert json.loads((out / "run" / "config.json").read_text())["n_tokens"] == 3000
    # A second run finds the folder taken, and leaves what is in it alone.
    before = (out / "report" / "report.json").read_bytes()
    again = saefeat("demo", *options, "--out", out)
    assert_refused(again, "never overwrites")
    assert (out / "report" / "report.json").read_bytes() == before


def test_cache_writes_a_store_goes_on_with_it_and_adds_to_it(local_model, text, tmp_path):
    out = tmp_path / "acts"
    options = ("--model", local_model, "--text", text, "--context-size", 16, "--out", out)
    hooks = ("--hooks", "blocks.0.hook_resid_post", "blocks.2.hook_mlp_out")
    finished = saefeat("cache", *options, *hooks, "--tokens", 500, "--dtype", "int8")
    assert finished.returncode == 0, finished.stderr
    assert f"{out}: 500 rows to train on and 50 held out, 2 hooks, int8" in finished.stdout
    assert "caching: 100%" in finished.stderr
    stream = sf.ActivationStream.from_store(out)
    assert stream.hooks == list(hooks[1:])
    assert_refused(saefeat("cache", *options, *hooks, "--tokens", 500), "already holds files")
    again = saefeat("cache", *options, *hooks, "--tokens", 500, "--resume")
    assert ": 500 rows" in again.stdout, again.stderr
    more = ("--tokens", 300, "--seed", 1, "--append")
    assert ": 800 rows" in saefeat("cache", *options, *hooks, *more).stdout
    assert_refused(saefeat("cache", *options, "--hooks", "nothing", *more), "'nothing'")


def test_a_reader_that_has_had_enough_is_no_error():
    """As in `saefeat study --help | head -1`."""
    command = [sys.executable, "-m", "saefeat", "cache", "--help"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait() == 141


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capfd):
    def worker_has_died():
        raise BrokenPipeError(32, "a worker has died")

    monkeypatch.setitem(COMMANDS, "report", worker_has_died)
    with pytest.raises(SystemExit, match="2"):
        main(["report"])
    assert "a worker has died" in capfd.readouterr().err


def test_help_of_cache_shows_an_example():
    finished = saefeat("cache", "--help")
    assert finished.returncode == 0
    assert "Example: saefeat cache" in finished.stdout
    assert "blocks.*.hook_resid_post" in finished.stdout


SMALL = ("--tokens", 2000, "--batch-size", 256, "--context-size", 16, "--buffer-rows", 512)


def test_a_plan_is_a_table_or_json_and_leaves_nothing(local_model, text, tmp_path):
    out = tmp_path / "out"
    options = ("--model", local_model, "--text", text, *SMALL, "--k", 4, "--out", out)
    table = saefeat("plan", *options, "--expansion-factors", 2, 4)
    assert table.returncode == 0, table.stderr
    assert "6 dictionaries" in table.stdout
    assert "host memory" in table.stdout
    planned = json.loads(saefeat("plan", *options, "--json").stdout)
    assert planned["n_dictionaries"] == 3
    assert planned["wall_seconds"] > 0
    assert planned["peak_host_bytes"] == sum(planned["host_parts"].values())
    assert not out.exists()


def test_training_says_what_it_will_cost_and_then_writes_the_bank(local_model, text, tmp_path):
    out = tmp_path / "out"
    options = ("--model", local_model, "--text", text, *SMALL, "--out", out)
    kind = ("--kind", "jumprelu", "--target-l0", 8, "--hooks", "blocks.[12].hook_resid_post")
    finished = saefeat("train", *options, *kind, "--seeds", 0, 1)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("Planned: 4 dictionaries in about ")
    assert f"{out}/saes" in finished.stdout
    assert "training: 100%" in finished.stderr
    bank = sf.Bank.load(out)
    hooks = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    assert set(bank) == {(hook, 8.0, seed) for hook in hooks for seed in (0, 1)}
    assert bank[hooks[0], 8, 0].config.target_l0 == 8
    again = saefeat("train", *options)
    assert_refused(again, "never overwrites")


def test_an_interrupted_training_says_how_to_go_on_and_goes_on(local_model, text, tmp_path):
    out = tmp_path / "out"
    options = ("--model", local_model, "--text", text, *SMALL, "--tokens", 60_000, "--k", 4)
    command = [sys.executable, "-m", "saefeat", "train", *map(str, options), "--out", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
        said = ""
        while "training:" not in said:
            said += running.stderr.read(1)
        running.send_signal(signal.SIGINT)
        said += running.stderr.read()
    assert running.returncode == 130
    assert "Go on with resume=True (saefeat train --resume)" in said.strip().splitlines()[-1]
    assert not (out / "saes").exists()
    finished = saefeat("train", *options, "--out", out, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert len(sf.Bank.load(out)) == 3
    other = saefeat("train", *options, "--k", 3, "--out", out, "--resume")
    assert_refused(other, "its dictionaries is")


@pytest.fixture(scope="module")
def run(local_model, text, tmp_path_factory):
    """Two layers, two seeds, trained from the command line by paths from the text's folder."""
    out = tmp_path_factory.mktemp("run") / "x"
    model = os.path.relpath(local_model, text)
    options = ("--model", model, "--text", ".", *SMALL, "--k", 4, "--seeds", 0, 1)
    hooks = ("--hooks", "blocks.[12].hook_resid_post", "--expansion-factors", 2)
    finished = saefeat("train", *options, *hooks, "--out", out, "--json", cwd=text)
    assert finished.returncode == 0, finished.stderr
    trained = json.loads(finished.stdout)
    assert trained["plan"]["n_dictionaries"] == 4
    assert sorted(sf.load_dictionary(one).origin.seed for one in trained["dictionaries"]) == [
        *(0, 0, 1, 1)
    ]
    return out


def test_a_run_is_described_by_the_config_of_another_and_flags_win(run, tmp_path):
    out = tmp_path / "again"
    described = ("--config", run / "config.json", "--out", out)
    again = saefeat("train", *described, "--seeds", 1, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    first, second = sf.Bank.load(run), sf.Bank.load(out)
    assert set(second) == {key for key in first if key[2] == 1}
    for key, one in second.items():
        assert torch.equal(one.W_dec, first[key].W_dec)
    shown = saefeat("plan", *described, "--help").stdout
    assert "Say what a training run costs" in shown
    assert "'blocks.[12].hook_resid_post'" in shown
    (tmp_path / "config.json").write_text(json.dumps({"model": "of a script"}))
    refused = saefeat("train", "--config", tmp_path / "config.json")
    assert_refused(refused, "no `saefeat train` wrote it")
    assert_refused(saefeat("plan", "--config", "absent.json"), "absent.json")


def test_resume_needs_no_more_than_the_folder_of_the_run(run):
    finished = saefeat("train", "--out", run, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert "Bank of 4 dictionaries" in finished.stdout
    assert_refused(saefeat("train", "--out", run, "--resume", "--k", 3), "its dictionaries is")


def test_measure_reads_what_the_run_held_out_and_report_compares(run, text, local_model, tmp_path):
    options = ("--tokens", 150, "--ce-tokens", 64)
    finished = saefeat("measure", run, *options, "--features", 3)
    assert finished.returncode == 0, finished.stderr
    assert "measuring: 100%" in finished.stderr
    report = sf.Report.load(run)
    assert report.n_tokens == 150
    assert all(row.ce_loss_recovered is not None for row in report.rows)
    assert {len(views.latents) for views in report.views.values()} == {3}
    assert f"{report}\n\nReport: {run}/report" in finished.stdout
    # The same tokens as in a script that holds out the same.
    job = Job.of_run(run / "config.json")
    bank = sf.Bank.load(run)
    again = sf.measure(bank, job.stream(), n_tokens=150)
    assert [row.l0 for row in again.rows] == [row.l0 for row in report.rows]
    assert_refused(saefeat("measure", run, *options), "never overwrites")
    # One dictionary of it, on a text that is named, beside the run.
    one = run / "saes" / "blocks.2.hook_resid_post" / "x2-seed1"
    single = ("--text", text, "--model", local_model, "--out", tmp_path / "one", "--json")
    measured = json.loads(saefeat("measure", one, *options, *single).stdout)
    assert [row["seed"] for row in measured["rows"]] == [1]
    assert_refused(saefeat("measure", one, "--out", tmp_path / "two"), "give --text and --model")
    compared = saefeat("report", run, tmp_path / "one")
    assert compared.stdout.count("blocks.2.hook_resid_post ") == 3, compared.stderr
    rows = json.loads(saefeat("report", run, tmp_path / "one", "--json").stdout)["rows"]
    assert [row["report"] for row in rows].count(str(tmp_path / "one")) == 1
    assert str(report) in saefeat("report", run, "--page").stdout
    copied = saefeat("report", run, "--out", tmp_path / "copy", "--json")
    assert json.loads(copied.stdout) == json.loads((tmp_path / "copy/report.json").read_text())
    assert_refused(saefeat("report", run, run), "different ones")
    assert_refused(saefeat("report", tmp_path), "report.json is missing")


def test_measure_counts_features_and_reads_a_store(run, tmp_path):
    job = Job.of_run(run / "config.json")
    sf.cache_activations(job.stream(), tmp_path / "acts", 1500, progress=False)
    options = ("--store", tmp_path / "acts", "--tokens", 100, "--counts", 1000)
    finished = saefeat("measure", run, *options, "--out", tmp_path / "report")
    assert finished.returncode == 0, finished.stderr
    report = sf.Report.load(tmp_path / "report")
    assert len(report.layers) == 2
    assert all("count_features" in layer.n_features["method"] for layer in report.layers)
    assert all(row.ce_loss_recovered is None for row in report.rows)
    absent = saefeat("measure", run, "--store", tmp_path / "none", "--out", tmp_path / "r")
    assert_refused(absent, "none")


def test_a_store_is_measured_with_the_model_that_is_named_and_not_beside_a_text(
    run, local_model, text, tmp_path
):
    store = str(tmp_path / "acts")
    job = Job.of_run(run / "config.json")
    sf.cache_activations(job.stream(), store, 500, progress=False)
    few = {"store": store, "tokens": 40, "ce_tokens": 16, "features": 1, "progress": False}
    report, _ = measure_run(run, model=str(local_model), out=tmp_path / "report", **few)
    assert all(row.ce_loss_recovered is not None for row in report.rows)
    with pytest.raises(ValueError, match="not on both"):
        measure_run(run, text=text, out=tmp_path / "other", **few)


def test_another_text_is_read_by_the_model_of_the_run_in_contexts_as_in_training(
    run, text, tmp_path
):
    few = {"tokens": 40, "ce_tokens": 1, "features": 0, "progress": False}
    report, _ = measure_run(run, text=text, out=tmp_path / "report", **few)
    assert report.cross_entropy["n_tokens"] == 16  # one context


def test_export_writes_what_sae_lens_opens(run, tmp_path):
    hooks = ("--hooks", "*.1.*")
    finished = saefeat("export", run, *hooks, "--out", tmp_path / "saes", "--json")
    assert finished.returncode == 0, finished.stderr
    folders = json.loads(finished.stdout)
    assert len(folders) == 2
    from sae_lens import SAE

    x = torch.randn(5, 32)
    for folder in folders:
        own, theirs = sf.load_dictionary(folder), SAE.load_from_disk(folder)
        assert own.hook_name == "blocks.1.hook_resid_post"
        torch.testing.assert_close(theirs.encode(x), own.encode(x).to_dense())
    again = saefeat("export", folders[0], "--out", tmp_path / "one")
    assert again.stdout.strip() == str(tmp_path / "one")
    assert (tmp_path / "one" / "cfg.json").is_file()
    assert_refused(saefeat("export", run, "--out", tmp_path / "saes"), "never overwrites")
    assert_refused(saefeat("export", run, "--hooks", "x", "--out", "unmade"), "is of x; it has")
    assert_refused(saefeat("export", tmp_path / "none"), "no trained dictionaries")


def test_what_sae_lens_does_not_have_is_not_exported(tmp_path):
    pursuit = MatchingPursuit(sf.MatchingPursuitConfig(k=2), 3, 6, Origin(hook_name="a"))
    topk = TopK(sf.TopKConfig(k=2), 3, 6, Origin(hook_name="a", target_hook_name="b"), 4)
    for one, name in ((pursuit, "matching_pursuit_refit"), (topk, "topk_transcoder")):
        folder = one.save(tmp_path / name)
        with pytest.raises(ValueError, match=f"SAELens has no {name}"):
            export(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_crosscoder_is_exported_hook_by_hook(tmp_path):
    origin = Origin(hook_name="both", hook_widths={"a": 3, "b": 3}, expansion_factor=2.0, seed=0)
    crosscoder = Crosscoder(sf.CrosscoderConfig(k=2), 6, 6, origin)
    crosscoder.initialise(torch.Generator(), torch.zeros(6), torch.randn(9, 6), torch.randn(9, 6))
    sf.Bank({("both", 2.0, 0): crosscoder}).save(tmp_path / "saes")
    folders = export(tmp_path / "saes", tmp_path / "out", hooks=("b",), progress=False)
    assert folders == [tmp_path / "out" / "both" / "b" / "x2-seed0"]
    torch.testing.assert_close(
        sf.load_dictionary(folders[0]).W_dec, crosscoder.layer("b").W_dec.detach()
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell):
    finished = saefeat("--tyro-print-completion", shell)
    assert finished.returncode == 0, finished.stderr
    assert "measure" in finished.stdout
    assert "expansion-factors" in finished.stdout


def assert_refused(finished, message):
    assert finished.returncode == 2
    (line,) = finished.stderr.strip().splitlines()
    assert line.startswith("saefeat: ")
    assert message in line
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--tokens", "three"], "invalid"),
        (["demo", "--colour", "red"], "--colour"),
        (["dmeo"], "dmeo"),
        (["cache", "--text", "x", "--dtype", "float8"], "float8"),
        (["cache", "--text", "x", "--tokens", "0"], "too few"),
        (["demo", "--tokens", "3"], "too few"),
        (["demo", "--model", "./nowhere", "--out", "unmade"], "no model folder at ./nowhere"),
        (["plan", "--model", "./nowhere"], "no model folder at ./nowhere"),
        (["train", "--tokens", "0", "--out", "unmade"], "--tokens must be 1 or more"),
        (["train", "--kind", "sparse"], "sparse"),
        (["train", "--kind", "gated", "--k", "4"], "gated has no --k. Say how many latents"),
        (["plan", "--target-l0", "4"], "with --k, or choose another --kind"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(arguments, message):
    assert_refused(saefeat(*arguments), message)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_run_that_does_not_fit_is_one_line_with_an_option(command, local_model, text, tmp_path):
    out = tmp_path / "out"
    options = ("--model", local_model, "--text", text, *SMALL, "--out", out)
    finished = saefeat(command, *options, "--expansion-factors", 1e8)
    assert_refused(finished, "It fits with ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "9", "--text", "{text}"], "3 layers"),
        (["--layers", "0", "7", "--text", "{text}"], "no layer 7"),
        (["--layers", "2", "--text", "{empty}"], "0 tokens"),
        (["--layers", "2", "--text", "{short}"], "context"),
        (["--layers", "2", "--text", "{text}/absent.txt"], "absent.txt"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left(local_model, text, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("w3 w4 w5")
    places = {"text": text, "empty": tmp_path / "empty.txt", "short": tmp_path / "short.txt"}
    filled = [argument.format(**places) for argument in arguments]
    out = tmp_path / "out"
    finished = saefeat("demo", "--model", local_model, "--tokens", 200, "--out", out, *filled)
    assert_refused(finished, message)
    assert not out.exists()


def test_debug_may_stand_before_the_command_under_torchrun_too(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="saefeat demo runs in one process"):
        main(["--debug", "demo"])


def test_debug_shows_the_traceback():
    finished = saefeat("--debug", "demo", "--tokens", "3")
    assert finished.returncode != 0
    assert "Traceback" in finished.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_defaults_and_an_example(command):
    finished = saefeat(command, "--help")
    assert finished.returncode == 0
    assert "(default: " in finished.stdout.replace("\n", " ")
    assert "--out " in finished.stdout
    assert f"Example: saefeat {command}" in finished.stdout


def test_every_kind_of_dictionary_has_a_name_on_the_command_line():
    kinds = [Job(kind=name).config_type for name in get_args(Kind)]
    assert sorted(map(str, kinds)) == sorted(str(kind.config_type) for kind in KINDS)
