"""Files appear whole or not at all."""

import json
import os

import pytest

from apr_jax.files import read_json, read_jsonl, write, write_json, write_jsonl


def test_a_file_is_written_with_its_folder_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write(path, b"first")
    assert path.read_bytes() == b"first"
    write(path, b"\x00second")
    assert path.read_bytes() == b"\x00second"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def crash(_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_what_was_written_is_read_and_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read_jsonl(path) == []
    write_jsonl(path, [{"a": 1}, {"b": [2]}])
    assert path.read_text() == '{"a": 1}\n{"b": [2]}\n'
    with path.open("a") as file:
        file.write('{"c": 3')
    assert read_jsonl(path) == [{"a": 1}, {"b": [2]}]
    assert read_json(tmp_path / "none.json") == {}
