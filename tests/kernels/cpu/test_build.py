"""Compiled kernels: made once, and whatever the compiler, the disk or an earlier process does, XLA can do the work."""

import functools
import logging
import pathlib
import shutil
import subprocess
import time

import pytest

from apr_jax.kernels import cpu, cpu_kernels
from apr_jax.kernels.cpu import bindings, build
from tests.kernels.cpu.test_bindings import normal, product

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(not build.is_available(), reason="no C++ compiler here")]
SMALL = 'extern "C" int apr_small() { return 7; }\n'


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not asked yet, with a small source and an empty folder for what is compiled."""
    source = tmp_path / "small.cc"
    source.write_text(SMALL)
    monkeypatch.setattr(build, "_folder", lambda: tmp_path / "native")
    monkeypatch.setattr(build, "_TARGETS", {source: ("apr_small",)})
    for module in (build, cpu):
        monkeypatch.setattr(module, "is_available", functools.cache(build.is_available.__wrapped__))
    return tmp_path / "native"


def _small():
    (library,) = build.made().values()
    return library.apr_small()


def _compiler(tmp_path, monkeypatch, script):
    """Let the compiler be a script; `$real` in it is the machine's own."""
    real = next(filter(None, map(shutil.which, build._COMPILERS)))
    path = tmp_path / "compiler"
    path.write_text(f'#!/bin/sh\nreal={real}\nfor out in "$@"; do :; done\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(path))
    return path


def test_a_library_is_compiled_once(fresh, monkeypatch):
    assert _small() == 7
    (first,) = fresh.iterdir()
    monkeypatch.setattr(build, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert _small() == 7
    assert [first] == list(fresh.iterdir())


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped", "a folder"])
def test_a_damaged_library_is_made_again_and_never_loaded(fresh, damage):
    """Loading one that is cut short ends the process with SIGBUS."""
    assert _small() == 7
    (path,) = fresh.iterdir()
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        flipped = bytes([*data[:5000], data[5000] ^ 1, *data[5001:]])
        contents = {"cut": data[: len(data) // 2], "empty": b"", "garbage": b"x" * 9000, "flipped": flipped}
        path.write_bytes(contents[damage])
    assert _small() == 7
    if damage != "a folder":
        assert [path] == list(fresh.iterdir())
        assert path.read_bytes() == data


BROKEN = {
    "hangs": ("sleep 1000", "has not ended after"),
    "hangs at work": ('[ "$1" = --version ] && exit; sleep 1000', "has not ended after"),
    "no text": (
        "[ \"$1\" = --version ] && exit; printf 'error: \\377\\376' >&2; exit 1",
        "error: \ufffd\ufffd",
    ),
    "no word": ('[ "$1" = --version ] && exit; exit 3', "ended with 3 and no word"),
    "nothing": ('[ "$1" = --version ] && exit; exit 0', "cannot be loaded"),
    "garbage": ('[ "$1" = --version ] && exit; echo garbage > "$out"', "cannot be loaded"),
    "half": (
        '[ "$1" = --version ] && exit; $real "$@"; head -c 6000 "$out" > "$out.half"; cp "$out.half" "$out"',
        "cannot be loaded",
    ),
    "another": (
        '[ "$1" = --version ] && exit; echo "int other;" > "$out.c"; $real -x c -shared -fPIC "$out.c" -o "$out"',
        "lacks apr_small",
    ),
    "killed": ('[ "$1" = --version ] && exit; kill -9 $$', "ended with -9"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_bad_compiler_is_one_message_and_leaves_nothing_for_a_good_one(fresh, how, tmp_path, monkeypatch, caplog):
    script, message = BROKEN[how]
    monkeypatch.setattr(build, "_VERSION_SECONDS", 1.0)
    monkeypatch.setattr(build, "_COMPILE_SECONDS", 3.0)
    with monkeypatch.context() as patched:
        _compiler(tmp_path, patched, script)
        began = time.monotonic()
        with caplog.at_level(logging.WARNING):
            assert cpu_kernels("cpu") is None
        assert time.monotonic() - began < 10
    (record,) = caplog.records
    assert message in record.message
    assert "so decoding takes twice the time" in record.message
    assert not fresh.exists() or not list(fresh.iterdir())
    assert _small() == 7


def test_a_new_version_of_the_compiler_compiles_anew(fresh, tmp_path, monkeypatch):
    path = _compiler(tmp_path, monkeypatch, '$real "$@"')
    assert _small() == 7
    path.write_text(path.read_text().replace("\n$real", '\n[ "$1" = --version ] && echo 99.0 && exit\n$real'))
    assert _small() == 7
    assert len(list(fresh.iterdir())) == 2


def test_a_compiler_that_is_given_up_leaves_no_process(fresh, tmp_path, monkeypatch):
    _compiler(tmp_path, monkeypatch, f'[ "$1" = --version ] && exit; echo $$ > {tmp_path}/pid; sleep 1000')
    monkeypatch.setattr(build, "_COMPILE_SECONDS", 1.0)
    with pytest.raises(subprocess.SubprocessError):
        build.made()
    group = (tmp_path / "pid").read_text().strip()
    fields = [path.read_text().rpartition(")")[2].split() for path in pathlib.Path("/proc").glob("[0-9]*/stat")]
    assert [state for state, _, of_group, *_ in fields if of_group == group and state != "Z"] == []


@pytest.mark.parametrize("where", ["/proc/no", "file", None])
def test_a_folder_that_cannot_be_written_costs_only_time(fresh, where, tmp_path, monkeypatch, caplog):
    folder = None if where is None else pathlib.Path(tmp_path / "small.cc" if where == "file" else where, "native")
    monkeypatch.setattr(build, "_folder", lambda: folder)
    with caplog.at_level(logging.WARNING):
        assert _small() == 7
    assert len(caplog.records) == (folder is not None)
    assert "so each start compiles them" in caplog.text or folder is None


@pytest.mark.parametrize("broken", ["no compiler", "no such header"])
def test_without_kernels_xla_does_the_work_and_a_warning_says_so(fresh, broken, monkeypatch, caplog):
    if broken == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    else:
        next(iter(build._TARGETS)).write_text("#include <no_such_header>\n")
    with caplog.at_level(logging.WARNING):
        assert cpu_kernels("cpu") is None
    said = "install one of c++, g++, clang++" if broken == "no compiler" else "no_such_header"
    assert said in caplog.text
    assert len(caplog.records) == 1
    with pytest.raises(RuntimeError, match=r"ask is_available\(\) first"):
        product(normal(1, 4), bindings.to_panels(normal(4, 4)), 4)
