"""The command line as a shell sees it: exit codes, one line on an error, and files at the end."""

import json
import os
import signal
import subprocess
import sys
from typing import get_args

import pytest
from tiny_models import VOCABULARY, save_tiny_llama

import saefeat as sf
from saefeat.dictionaries.registry import KINDS
from saefeat.job import Job, Kind


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


def saefeat(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "saefeat", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
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


def test_debug_shows_the_traceback():
    finished = saefeat("--debug", "demo", "--tokens", "3")
    assert finished.returncode != 0
    assert "Traceback" in finished.stderr


@pytest.mark.parametrize("command", ["demo", "plan", "train"])
def test_help_shows_defaults_and_an_example(command):
    finished = saefeat(command, "--help")
    assert finished.returncode == 0
    assert "smollm2-135m" in finished.stdout
    assert f"Example: saefeat {command}" in finished.stdout


def test_every_kind_of_dictionary_has_a_name_on_the_command_line():
    kinds = [Job(kind=name).config_type for name in get_args(Kind)]
    assert sorted(map(str, kinds)) == sorted(str(kind.config_type) for kind in KINDS)
