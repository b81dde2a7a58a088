"""`run_study`: train or take models, observe each, compare them, and say what follows."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saefeat.activations.sources import fingerprint
from saefeat.activations.tokens import Tokens, load_tokens
from saefeat.core.files import claim_folder, read_json, write_bytes, write_json
from saefeat.core.processes import run_in_processes
from saefeat.core.progress import progress_bar
from saefeat.models.zoo import Text, load_text, train_family
from saefeat.study.analysis import findings
from saefeat.study.figures import layer_figure, slope_figure
from saefeat.study.finding import Findings
from saefeat.study.observations import Observations, ObservedShape
from saefeat.study.observe import Subject, observe, parts
from saefeat.study.pairs import Pair, observe_pair, pairs
from saefeat.study.protocol import Protocol
from saefeat.study.subjects import own_subjects, zoo_subjects


def run_study(
    out: str | Path,
    protocol: Protocol | None = None,
    *,
    models: Sequence[Any] = (),
    random_models: Sequence[Any] = (),
    tokens: Tokens | None = None,
    text: str | Path | None = None,
    processes: int | None = None,
    progress: bool = True,
) -> Findings:
    """How the number of features per neuron goes with the shape of models of equal size.

    The protocol is written before anything is measured, and a folder goes on with its own only.
    What is there already is not measured again, so that the same call goes on after a kill; models
    of the zoo are kept in the cache folder and serve other studies too.

    Args:
        out: The folder of the study: `protocol.json`, `models/`, `pairs/`, `zoo.json`,
            `observations.json`, `findings.json`, `findings.txt` and two pictures.
        protocol: Every choice that the result depends on; None for the default.
        models: Models of one's own in place of the zoo, each as for `load_model`: two shapes at
            least, of equal size, and two models of each shape.
        random_models: The same shapes with random weights, as a control.
        tokens: What all models are counted on; None for `text` as the first model's tokenizer
            cuts it. Models of one's own must all have one tokenizer.
        text: A text file or folder that the zoo learns, and that models are counted on, what was
            held out of training first. None: the sources of Python's standard library.
        processes: Models that are trained, and observed, at a time, with a thread each; None for
            as many as there are cores. Model objects, which cannot be sent, take turns here.
        progress: Whether to draw progress bars on standard error.

    Returns:
        What was found; `print` it.

    Raises:
        FileExistsError: The folder is of another protocol, text or models, or no study.
        ValueError: There are too few models of one's own, none is wider than another, a random one
            has a shape of its own, or their tokenizers differ.
    """
    out = Path(out)
    protocol = protocol or Protocol()
    processes = processes or os.cpu_count() or 1
    own: list[Subject] = []
    if models:
        protocol, own = own_subjects(models, random_models, protocol)
    documents = None if models and tokens is not None else load_text(text)
    _claim(out, protocol, documents, own, tokens)
    subjects = own or _zoo(out, protocol, documents, processes, progress)
    if not all(one.is_portable for one in subjects):
        processes = 1
    if tokens is None:
        assert documents is not None
        tokens = _tokens(subjects[0], protocol, documents)
    _observe_all(subjects, tokens, protocol, out / "models", processes, progress)
    _pair_all(list(pairs(subjects, protocol)), tokens, protocol, out, processes, progress)
    observations = gather(out, protocol, subjects)
    found = findings(observations, protocol.rules)
    write_json(out / "observations.json", observations.to_dict())
    write_json(out / "findings.json", found.to_dict())
    write_bytes(out / "findings.txt", f"{found}\n".encode())
    slope_figure(found, observations).savefig(out / "slope.png")
    layer_figure(found, observations, protocol.rules).savefig(out / "layers.png")
    return found


def _zoo(
    out: Path, protocol: Protocol, text: Text | None, processes: int, progress: bool
) -> list[Subject]:
    family = train_family(
        protocol.shapes,
        protocol.model_seeds,
        protocol.training,
        text=text,
        tolerance=protocol.rules.equal_loss,
        processes=processes,
        progress=progress,
    )
    write_json(out / "zoo.json", family.to_dict())
    return zoo_subjects(protocol, family, out / "random")


def gather(out: Path, protocol: Protocol, subjects: Sequence[Subject]) -> Observations:
    """All records in the folder of a finished study."""
    records: dict[str, list[dict[str, Any]]] = {"layer": [], "model": [], "joint": [], "pair": []}
    for subject in subjects:
        for name in parts(subject, protocol):
            kind = name.partition("-")[0]
            records[kind] += read_json(out / "models" / subject.name / f"{name}.json")
    for pair in pairs(subjects, protocol):
        records["pair"].append(read_json(_pair_file(out, pair)))
    sizes = {one.shape_label: one.n_parameters for one in subjects}
    return Observations.from_dict(
        {
            "shapes": [
                asdict(
                    ObservedShape(
                        label=shape.label,
                        n_layers=shape.n_layers,
                        d_model=shape.d_model,
                        n_parameters=sizes[shape.label],
                    )
                )
                for shape in protocol.shapes
            ],
            "pair": protocol.pair,
            "layers": records["layer"],
            "models": records["model"],
            "joint": [one for one in records["joint"] if one["reuse"] is not None],
            "pairs": records["pair"],
            "protocol": protocol.to_dict(),
        }
    )


def _claim(
    out: Path, protocol: Protocol, text: Text | None, own: Sequence[Subject], tokens: Tokens | None
) -> None:
    """Write what is studied into a new folder, or see that the folder has the same."""
    facts: dict[str, Any] = {
        "protocol": protocol.to_dict(),
        "text": None if text is None else text.digest,
    }
    # What was measured of other models of these shapes must not be taken for that of these.
    if own:
        facts["models"] = {one.name: one.fingerprint for one in own}
    if tokens is not None:
        facts["tokens"] = fingerprint(tokens.ids, tokens.counts, tokens.n_held_out)
    path = out / "protocol.json"
    if not path.exists():
        write_json(claim_folder(out, "study") / path.name, facts)
    elif read_json(path) != json.loads(json.dumps(facts)):
        raise FileExistsError(
            f"{out} is a study by another protocol, or of another text or other models, see "
            f"{path}. A protocol is fixed before there is a result: give another folder."
        )


def _tokens(first: Subject, protocol: Protocol, text: Text) -> Tokens:
    """The text that every model is counted on; all read the same."""
    wanted = protocol.n_tokens + protocol.held_out_tokens
    # Room for what is left out: BOS and separators, a context that is cut, outliers.
    most = round(1.1 * wanted) + 4 * protocol.context_size
    documents: list[str] = []
    n_bytes = 0
    for document in (*text.held_out, *text.train):
        documents.append(document.decode("utf-8", errors="replace"))
        n_bytes += len(document)
        # A token is a byte at least, and about four in a vocabulary of words.
        if n_bytes > 8 * most:
            break
    return load_tokens(
        documents,
        tokenizer=first.model().tokenizer,
        context_size=protocol.context_size,
        max_tokens=most,
        held_out_fraction=protocol.held_out_tokens / wanted,
    )


def _observe_all(
    subjects: Sequence[Subject],
    tokens: Tokens,
    protocol: Protocol,
    folder: Path,
    processes: int,
    progress: bool,
) -> None:
    # Those with most layers first, so that none of them is left for the end.
    order = sorted(subjects, key=lambda one: -one.n_layers)
    _run_all(
        observe,
        [(one, tokens, protocol, folder / one.name) for one in order],
        [folder / one.name / f"{name}.json" for one in order for name in parts(one, protocol)],
        name="layers",
        processes=processes,
        progress=progress,
    )


def _pair_all(
    wanted: Sequence[Pair],
    tokens: Tokens,
    protocol: Protocol,
    out: Path,
    processes: int,
    progress: bool,
) -> None:
    (out / "pairs").mkdir(exist_ok=True)
    _run_all(
        _observe_pair,
        [(pair, tokens, protocol, out) for pair in wanted if not _pair_file(out, pair).exists()],
        [_pair_file(out, pair) for pair in wanted],
        name="pairs of models",
        processes=processes,
        progress=progress,
    )


def _pair_file(out: Path, pair: Pair) -> Path:
    return out / "pairs" / f"{pair.name}.json"


def _observe_pair(pair: Pair, tokens: Tokens, protocol: Protocol, out: Path) -> None:
    observed = observe_pair(pair, tokens, protocol, out / "models")
    write_json(_pair_file(out, pair), asdict(observed))


def _run_all(
    function: Callable[..., None],
    calls: Sequence[tuple[Any, ...]],
    files: Sequence[Path],
    *,
    name: str,
    processes: int,
    progress: bool,
) -> None:
    """Make the calls; what they have done shows in the files that there are."""
    with progress_bar(total=len(files), desc=name, unit="file", shown=progress) as bar:

        def look() -> None:
            bar.update(sum(file.exists() for file in files) - bar.n)

        look()
        run_in_processes(function, calls, processes, look=look)
