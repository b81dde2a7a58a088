"""The study from models to findings, on the smallest that still runs every part."""

import json
from dataclasses import replace

import pytest

from saefeat.cli import main
from saefeat.models.load import load_model
from saefeat.models.size import n_block_weights
from saefeat.models.zoo import Shape, TrainingOptions, random_model
from saefeat.study.protocol import PRESETS, Protocol
from saefeat.study.run import run_study

NARROW, WIDE = Shape(4, 16, 1), Shape(1, 32, 2)
PROTOCOL = Protocol(
    shapes=(NARROW, WIDE),
    pair=(NARROW.label, WIDE.label),
    training=TrainingOptions(n_tokens=60 * 512, context_size=32, n_snapshots=4),
    model_seeds=(0, 1),
    random_seeds=(0,),
    sites=("residual",),
    layers_per_model=1,
    context_size=32,
    n_tokens=12_000,
    held_out_tokens=4_000,
    picks=(1,),
    expansion_factors=(2,),
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """One cache for all tests of the file, so that the zoo is trained once."""
    folder = tmp_path_factory.getbasetemp() / "study-cache"
    monkeypatch.setenv("SAEFEAT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = [f"{n} times {i} is {n * i}, and {n} squared is {n * n}.\n" for n in range(60)]
        (folder / f"{i}.txt").write_text("".join(lines))
    return folder


def study(out, text, protocol=PROTOCOL, **options):
    return run_study(out, protocol, text=text, processes=1, progress=False, **options)


def test_a_study_says_what_follows_and_goes_on_after_a_kill(tmp_path, text, own_cache):
    out = tmp_path / "study"
    found = study(out, text)
    assert len(found.parts) == 3  # one site by three instruments
    assert {part.verdict.status for part in found.parts} == {"unmeasurable"}
    observations = json.loads((out / "observations.json").read_text())
    # 2 trained models and a random one of each shape, one layer, three instruments.
    assert len(observations["layers"]) == 2 * 3 * 3
    assert {one["control"] for one in observations["layers"]} == {"trained", "random"}
    assert {one["shape_label"] for one in observations["joint"]} == {NARROW.label}
    assert len(observations["pairs"]) == 2
    losses = {
        (one["shape_label"], one["model_seed"]): one["validation_loss"]
        for one in observations["models"]
        if one["control"] == "trained"
    }
    zoo = json.loads((out / "zoo.json").read_text())
    assert losses == {(one["shape"], one["seed"]): one["validation_loss"] for one in zoo["models"]}
    for name in ("findings.txt", "slope.png", "layers.png"):
        assert (out / name).stat().st_size > 500
    assert not list(out.rglob("activations")), "stores are left behind"

    # What a kill leaves: some files. The others are measured again, and come out the same.
    layer = out / "models" / f"{NARROW.label}-trained-1" / "layer-residual-3.json"
    before = {file: file.stat().st_mtime_ns for file in own_cache.rglob("*.safetensors")}
    old, kept = layer.read_text(), out / "models" / f"{WIDE.label}-trained-0" / "model.json"
    kept_at = kept.stat().st_mtime_ns
    layer.unlink()
    # Or all files, and activations that nothing reads any more.
    left = out / "models" / f"{WIDE.label}-trained-0" / "activations"
    left.mkdir()
    assert study(out, text).to_dict() == found.to_dict()
    assert layer.read_text() == old
    assert kept.stat().st_mtime_ns == kept_at
    assert not left.exists()
    assert before == {file: file.stat().st_mtime_ns for file in own_cache.rglob("*.safetensors")}

    with pytest.raises(FileExistsError, match="another protocol"):
        study(out, text, replace(PROTOCOL, n_tokens=13_000))


def gpt2(shape, d_mlp):
    """A model of random weights that is not the zoo's."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=257,
        n_positions=32,
        n_layer=shape.n_layers,
        n_embd=shape.d_model,
        n_head=shape.n_heads,
        n_inner=d_mlp,
    )
    tokenizer = random_model(NARROW, 0, device="cpu").tokenizer
    return TransformerBridge.boot_transformers(
        "gpt2", hf_model=GPT2LMHeadModel(config), tokenizer=tokenizer
    )


def test_weights_of_blocks_are_counted_once_whatever_the_model():
    d, d_mlp = NARROW.d_model, 48
    expected = NARROW.n_layers * (4 * d * d + 2 * d * d_mlp)
    assert n_block_weights(gpt2(NARROW, d_mlp)) == expected
    for shape in (NARROW, WIDE):
        assert n_block_weights(random_model(shape, 0, device="cpu")) == shape.n_parameters
    config = load_model("tiny-a").cfg
    assert n_block_weights(load_model("tiny-a")) == 12 * config.n_layers * config.d_model**2


def test_models_of_ones_own_take_the_place_of_the_zoo(tmp_path, text):
    models = [
        random_model(shape, seed, device="cpu") for shape in (NARROW, WIDE) for seed in (0, 1)
    ]
    protocol = replace(PROTOCOL, crosscoder_sites=())
    found = study(tmp_path / "study", text, protocol, models=models)
    observations = json.loads((tmp_path / "study" / "observations.json").read_text())
    shapes = [(one["label"], one["n_parameters"]) for one in observations["shapes"]]
    assert shapes == [(NARROW.label, NARROW.n_parameters), (WIDE.label, WIDE.n_parameters)]
    assert "No random models were looked at." in str(found)
    # Before any training nobody knows more than that there are 257 symbols.
    for one in observations["models"]:
        assert one["validation_loss"] == pytest.approx(5.55, abs=0.4)

    others = [
        random_model(shape, seed, device="cpu") for shape in (NARROW, WIDE) for seed in (2, 3)
    ]
    with pytest.raises(FileExistsError, match="other models"):
        study(tmp_path / "study", text, protocol, models=others)


def test_one_shape_or_width_is_no_study(tmp_path, text):
    models = [random_model(NARROW, seed, device="cpu") for seed in (0, 1)]
    with pytest.raises(ValueError, match="two shapes"):
        study(tmp_path / "study", text, models=models)
    models += [random_model(WIDE, seed, device="cpu") for seed in (0, 1)]
    with pytest.raises(ValueError, match="A random model is 2x16"):
        study(
            tmp_path / "study",
            text,
            models=models,
            random_models=[random_model(Shape(2, 16, 1), 0, device="cpu")],
        )
    with pytest.raises(ValueError, match="Their heads or MLPs differ"):
        study(tmp_path / "study", text, models=[*models, gpt2(NARROW, d_mlp=48)])
    alike = [random_model(Shape(n, 16, 1), seed, device="cpu") for n in (1, 2) for seed in (0, 1)]
    with pytest.raises(ValueError, match="a narrow shape and a wider one"):
        study(tmp_path / "study", text, models=alike)
    assert not (tmp_path / "study").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path, text):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="a study never overwrites"):
        study(tmp_path, text)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": ("attention",)}, "sites"),
        ({"model_seeds": (0,)}, "2 model seeds"),
        ({"pair": ("8x48", "9x9")}, "pair"),
        ({"pair": (WIDE.label, NARROW.label)}, "a narrow shape and a wider one"),
        ({"model_seeds": (0, 1, 1)}, "model_seeds names each once"),
        ({"n_tokens": 0}, "n_tokens"),
        ({"layers_per_model": 0}, "layers_per_model"),
    ],
)
def test_a_protocol_that_compares_nothing_is_an_error(change, words):
    with pytest.raises(ValueError, match=words):
        replace(PROTOCOL, **change)


def test_layers_are_evenly_spaced_and_the_last_is_among_them():
    assert replace(PROTOCOL, layers_per_model=2).layers(8) == [3, 7]
    assert replace(PROTOCOL, layers_per_model=None).layers(3) == [0, 1, 2]
    assert replace(PROTOCOL, layers_per_model=4).layers(2) == [0, 1]


def test_presets_differ_in_size_alone():
    quick, default, full = (PRESETS[name]() for name in ("quick", "default", "full"))
    assert len(quick.model_seeds) < len(default.model_seeds) < len(full.model_seeds)
    assert quick.n_tokens < default.n_tokens < full.n_tokens
    assert quick.rules == default.rules == full.rules
    assert len(default.shapes) == 2 < len(full.shapes) == 4
    for preset in (default, full):
        for seeds in (preset.model_seeds, preset.random_seeds):
            assert len(seeds) >= preset.rules.least_replicates, "neither could have a slope"


def test_two_presets_at_once_are_one_line_of_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["study", "--quick", "--full"])
    assert "give one of them" in capsys.readouterr().err
