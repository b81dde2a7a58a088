"""Documents, one after the other, from whatever holds them: files, lists, data sets."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Long documents are tokenised in pieces, so that a book does not have to be tokenised to the
# end when its first page is enough, and in batches, which tokenizers work through in parallel.
PIECE_CHARACTERS = 1 << 16
BATCH_CHARACTERS = 1 << 18

logger = logging.getLogger(__name__)

Document = str | Sequence[int]


def iterate_documents(
    source: Any, *, seed: int, text_column: str, pattern: str
) -> Iterator[Document]:
    """The documents of `source`, shuffled by `seed` unless it can only be read in order.

    Args:
        source: See `load_tokens`; no tensor.
        seed: Decides the order.
        text_column: Where the rows of a data set hold their text; rows without it must have
            a column "input_ids".
        pattern: The files of a folder that count.

    Raises:
        FileNotFoundError: There is no such file, or no file in the folder matches.
        TypeError: `source` is no source of documents.
        ValueError: A file is not UTF-8 text, or a row has neither column. In a folder such a
            file is left out, with a warning in the log, unless no file is text.
    """
    if isinstance(source, str | Path):
        paths = _files(source, pattern)
        n_read, unreadable = 0, None
        for index in _shuffled(len(paths), seed):
            try:
                text = _read_text(paths[index])
            except ValueError as error:
                unreadable = error
                logger.warning("Left out: %s", error)
                continue
            n_read += 1
            yield text
        if n_read == 0 and unreadable is not None:
            raise unreadable
    elif isinstance(source, Mapping) or not hasattr(source, "__iter__"):
        splits = f" with the keys {list(source)}" if isinstance(source, Mapping) else ""
        raise TypeError(
            f"A {type(source).__name__}{splits} holds no documents. Give a path, a list of "
            "strings, an int tensor of token ids, or one split of a data set."
        )
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        for index in _shuffled(len(source), seed):
            yield _row_document(source[int(index)], text_column)
    else:
        for row in source:
            yield _row_document(row, text_column)


def tokenise(
    documents: Iterator[Document], tokenizer: Any
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Token ids without special tokens, piece by piece, each with the number of its document.

    Pieces end at a line break where there is one, where most tokenizers start a new token
    anyway.

    Raises:
        ValueError: There is text, but no tokenizer.
    """
    numbered = enumerate(documents)
    for is_text, group in itertools.groupby(numbered, lambda one: isinstance(one[1], str)):
        if not is_text:
            for number, document in group:
                yield number, np.asarray(document, dtype=np.int64)
            continue
        if tokenizer is None:
            raise ValueError(
                "Text needs a tokenizer: pass tokenizer=model.tokenizer. Without one, give token "
                "ids: an int tensor, or a data set with a column 'input_ids'."
            )
        for numbers, pieces in batched_pieces(group):
            yield from zip(numbers, _token_ids(pieces, tokenizer), strict=True)


def batched_pieces(
    numbered: Iterable[tuple[int, Document]],
) -> Iterator[tuple[list[int], list[str]]]:
    """Texts in pieces to be tokenised one by one, in batches, each with its document's number."""
    numbers: list[int] = []
    pieces: list[str] = []
    n_characters = 0
    for number, document in numbered:
        if not isinstance(document, str):
            raise ValueError(
                f"Document {number} is token ids, and this takes text: where in it each token ends "
                "is known to its tokenizer alone. Name the column with the text by text_column."
            )
        for piece in _pieces(document):
            numbers.append(number)
            pieces.append(piece)
            n_characters += len(piece)
            if n_characters >= BATCH_CHARACTERS:
                yield numbers, pieces
                numbers, pieces, n_characters = [], [], 0
    if pieces:
        yield numbers, pieces


def _token_ids(texts: list[str], tokenizer: Any) -> list[npt.NDArray[np.int64]]:
    # verbose=False: no warning that a document is longer than the model's context.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _files(source: str | Path, pattern: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no file or folder {path}. To give the text itself, put it in a list."
        )
    paths = sorted(file for file in path.glob(pattern) if file.is_file())
    if not paths:
        raise FileNotFoundError(f"No file in the folder {path} matches the pattern {pattern!r}.")
    return paths


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error}). Convert it, or in a folder choose the files that "
            "are text by pattern, such as pattern='**/*.txt'."
        ) from error


def _row_document(row: Any, text_column: str) -> Document:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise TypeError(
            f"A document is a string or a row of a data set, not a {type(row).__name__}. "
            "Token ids are given as an int tensor."
        )
    if text_column in row:
        return str(row[text_column])
    if "input_ids" in row:
        return list(row["input_ids"])
    raise ValueError(
        f"The data set has no column {text_column!r} and none 'input_ids'; it has {list(row)}. "
        "Name the one with the text by text_column."
    )


def _shuffled(n: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(n)
