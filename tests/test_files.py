"""Files appear whole or not at all."""

import errno
import json
import os

import pytest

from apr_jax.files import FileError, explain, read_json, read_jsonl, write, write_json, write_jsonl


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
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


BAD = {
    b"": "empty",
    b" \n": "empty",
    b"{": "not JSON",
    b'{"a": 1}}': "not JSON",
    b"\xff\xfe{}": "not UTF-8",
    b"[" * 100_000: "nested too deeply",
    b'{"a": ' * 100_000: "nested too deeply",
    b'{"a": ' + b"9" * 5_000 + b"}": "a number of 5,000 digits",
    b'{"a": ' + b"9" * 400 + b"}": "a number of 400 digits",
    b'{"a": NaN}': "the number NaN is not finite",
    b'{"a": -Infinity}': "the number -Infinity is not finite",
    b'{"a": 1e999}': "the number 1e999 is not finite",
    b'{"a": "\\ud800"}': "surrogates not allowed",
    b"[]": "expected a JSON object, found list",
    b"null": "expected a JSON object, found NoneType",
    b"3": "expected a JSON object, found int",
    b'"text"': "expected a JSON object, found str",
    b"{}": "the field a is missing",
    b'{"a": "1"}': "the field a holds str",
    b'{"a": true}': "the field a holds bool",
    b'{"a": null}': "the field a holds NoneType",
}


@pytest.mark.parametrize("content", BAD, ids=[f"{content[:12]!r}" for content in BAD])
def test_what_is_no_such_object_is_one_sentence(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(FileError) as error:
        read_json(path, "fetch it again", a=(int, float))
    sentence = str(error.value)
    assert sentence.startswith(f"{path}: ")
    assert BAD[content] in sentence
    assert sentence.endswith("; fetch it again")
    assert "\n" not in sentence
    if b"\n" not in content and content:
        path.write_bytes(b'{"a": 1}\n' + content + b"\n")
        with pytest.raises(FileError, match=f"{path}, line 2: "):
            read_jsonl(path, "fetch it again", a=(int, float))


def test_marks_and_rare_line_ends_are_no_damage(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8 \xc2\x85 \\ud83d\\ude00"}\r\n{"a": "2"}\n')
    assert [record["a"] for record in read_jsonl(path, a=str)] == ["\u2028 \x85 \U0001f600", "2"]
    path.write_bytes(b'\xef\xbb\xbf{"a": 1000000000000000019884624838656}')
    assert read_json(path) == {"a": 10**30 + 19884624838656}


def test_an_error_of_the_system_names_the_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):

        def fail(_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"x\.json") as error:
            write_json(path, {})
        sentence = explain(error.value)
        assert sentence.startswith(f"{path}: {os.strerror(code)}; ")
    assert list(tmp_path.iterdir()) == []


def test_a_device_or_a_link_stays_what_it_is(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"x"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe", b"y")
    assert os.read(reader, 9) == b"y"
    os.close(reader)
