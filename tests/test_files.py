"""Files: whole or absent when written, checked when read, never overwritten by accident."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saefeat.core.files import (
    check_unclaimed,
    claim_folder,
    publish_folder,
    read_json,
    read_tensors,
    temporary_folder,
    write_bytes,
    write_json,
    write_tensors,
)

WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json(path, {"a": 1}),
    "bytes": lambda path: write_bytes(path, b"abc"),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(2)}),
}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stored_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().clone().untyped_storage().tolist()


# Writing.


def test_json_comes_back_as_it_was_and_ends_in_a_line_break(tmp_path: Path) -> None:
    value = {"a": [1, 0.1, None, True, "é\n"], "b": {"c": 1e-300, "d": 2**60}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    text = (tmp_path / "x.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == value


def test_tensors_come_back_bit_for_bit_in_their_dtype(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=generator)
    tensors = {
        "float32": x,
        "float64": x.double() / 3,
        "bfloat16": x.bfloat16(),
        "not_finite": torch.tensor([torch.nan, torch.inf, -0.0]),
        "counts": torch.tensor([2**62, -1]),
        "mask": x > 0,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "with_gradient": x.clone().requires_grad_(),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    loaded = read_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert stored_bytes(loaded[name]) == stored_bytes(tensor)


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "x.safetensors", {"transposed": x.T, "column": x[:, 1]})
    loaded = read_tensors(tmp_path / "x.safetensors")
    assert loaded["transposed"].tolist() == x.T.tolist()
    assert loaded["column"].tolist() == [1, 5, 9]


@pytest.mark.parametrize("kind", WRITERS)
def test_writing_makes_the_parents_and_leaves_one_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new" / "folder" / "x"
    WRITERS[kind](path)
    WRITERS[kind](path)
    assert list(content(tmp_path)) == ["new/folder/x"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_json_has_no_way_to_write_what_is_not_finite(tmp_path: Path, bad: float) -> None:
    write_json(tmp_path / "x.json", "old")
    before = content(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": [bad]})
    assert content(tmp_path) == before


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"old": 1})
    before = content(tmp_path)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x", {"a": {1, 2}})
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "x", object())  # type: ignore[arg-type]
    with pytest.raises((ValueError, RuntimeError)):
        write_tensors(tmp_path / "x", {"a": torch.ones(2, device="meta")})
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(tmp_path / "x", {"a": shared, "b": shared})
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_fails_at_its_last_step_leaves_no_temporary_file(
    tmp_path: Path, kind: str
) -> None:
    """The new file is complete on disk, and cannot take the place of a folder."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").write_text("kept")
    with pytest.raises(OSError, match="x"):
        WRITERS[kind](tmp_path / "x")
    assert content(tmp_path) == {"x/kept": b"kept"}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_parent_that_is_a_file_is_an_error_and_stays(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        WRITERS[kind](tmp_path / "file" / "x")
    assert content(tmp_path) == {"file": b"kept"}


def test_a_reader_with_the_old_file_open_keeps_reading_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"old")
    with (tmp_path / "x").open("rb") as file:
        write_bytes(tmp_path / "x", b"new and longer")
        assert file.read() == b"old"
    assert (tmp_path / "x").read_bytes() == b"new and longer"


# Reading.


@pytest.mark.parametrize(
    "damaged", [b"", b'{"a": 1', b'{"a": 1}}', b"\x00\x01", b'{"a": "\xff"}', b"{'a': 1}"]
)
def test_damaged_json_is_one_error_that_names_the_file(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged or cut off") as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert type(caught.value) is ValueError


def whole_safetensors(folder: Path) -> bytes:
    write_tensors(folder / "whole", {"a": torch.ones(4, 4), "b": torch.zeros(3)})
    return (folder / "whole").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:4],
        lambda whole: whole[:20],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: b"\xff" * 8 + whole[8:],
        lambda whole: struct.pack("<Q", 2) + b"[]" + whole[-76:],
        lambda whole: b"not safetensors at all, but a line of text",
    ],
)
def test_damaged_safetensors_are_one_error_that_names_the_file(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage(whole_safetensors(tmp_path)))
    with pytest.raises(ValueError, match="damaged or cut off") as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_missing_file_is_an_error_that_names_it(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")
    with pytest.raises(OSError, match=tmp_path.name):
        read(tmp_path)


# Claiming.


def test_a_new_and_an_empty_folder_can_be_claimed(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    assert claim_folder(new) == new
    assert new.is_dir()
    assert claim_folder(str(new)) == new


def test_checking_makes_nothing(tmp_path: Path) -> None:
    check_unclaimed(tmp_path / "a" / "b")
    check_unclaimed(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("claim", [claim_folder, check_unclaimed])
@pytest.mark.parametrize("entry", ["file", ".hidden", "folder/"])
def test_a_folder_that_holds_anything_is_refused_and_unchanged(
    tmp_path: Path, claim: Callable[..., object], entry: str
) -> None:
    held = tmp_path / entry
    if entry.endswith("/"):
        held.mkdir()
    else:
        held.write_text("kept")
    with pytest.raises(FileExistsError, match="a report never overwrites") as caught:
        claim(tmp_path, what="report")
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [held.name]


@pytest.mark.parametrize("claim", [claim_folder, check_unclaimed])
def test_a_file_is_no_folder_to_claim(tmp_path: Path, claim: Callable[..., object]) -> None:
    (tmp_path / "x").write_text("kept")
    with pytest.raises(FileExistsError, match="is a file"):
        claim(tmp_path / "x")
    assert content(tmp_path) == {"x": b"kept"}


# Folders.


def publish(folder: Path, text: str, **options: bool) -> None:
    """A folder with one file, made as a whole."""
    with temporary_folder(folder) as draft:
        write_bytes(draft / "a", text.encode())
        publish_folder(draft, folder, **options)


def test_a_folder_takes_the_place_of_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path / "x", "first")
    publish(tmp_path / "x", "second")
    assert content(tmp_path) == {"x/a": b"second"}


def test_a_folder_that_cannot_get_its_name_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "x", "first")
    plain = Path.rename
    with temporary_folder(tmp_path / "x") as draft, monkeypatch.context() as patch:
        write_bytes(draft / "a", b"second")

        def failing(self: Path, target: Path) -> Path:
            if self == draft:
                raise OSError(5, "Input/output error")
            return plain(self, target)

        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="Input/output"):
            publish_folder(draft, tmp_path / "x")
    assert content(tmp_path) == {"x/a": b"first"}


def test_a_kill_while_the_older_folder_is_deleted_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "x", "first")

    def killed(folder: Path, **options: bool) -> None:
        (folder / "a").unlink()
        raise KeyboardInterrupt

    with temporary_folder(tmp_path / "x") as draft, monkeypatch.context() as patch:
        write_bytes(draft / "a", b"second")
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            publish_folder(draft, tmp_path / "x")
    assert content(tmp_path / "x") == {"a": b"second"}
    publish(tmp_path / "x", "third")
    assert content(tmp_path) == {"x/a": b"third"}


def test_a_folder_that_is_not_to_be_replaced_stays_though_others_made_it_meanwhile(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "x"
    with temporary_folder(folder, is_shared=True) as slower:
        write_bytes(slower / "a", b"second")
        with temporary_folder(folder, is_shared=True) as faster:
            write_bytes(faster / "a", b"first")
            publish_folder(faster, folder, replace=False)
        publish_folder(slower, folder, replace=False)
    assert content(tmp_path) == {"x/a": b"first"}


def test_a_folder_that_is_not_finished_is_gone(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        write_bytes(draft / "a", b"half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"), temporary_folder(tmp_path / "x") as one:
        fail(one)
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_killed_process_left_of_the_same_folder_is_deleted(tmp_path: Path) -> None:
    left = tmp_path / f".x.{'0' * 32}"
    others = [tmp_path / name for name in (f".x.y.{'0' * 32}", ".x.backup", ".x")]
    for folder in (left, *others):
        folder.mkdir()
    publish(tmp_path / "x", "new")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x", *others])
