"""What is compiled is kept whole and within a limit, wherever this user may write, and a user may have no home."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from apr_jax import caches
from apr_jax.caches import CompiledPrograms, cache_folder
from tests.object_store.server import PACKAGES

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "no sum", "no program", "a folder"])
def test_what_is_not_as_it_was_written_is_deleted_and_can_be_kept_anew(tmp_path, damage):
    programs, data = CompiledPrograms(tmp_path, 1 << 20), os.urandom(5000)
    programs.put("key", data)
    assert programs.get("key") == data
    path = tmp_path / "key-cache"
    if damage in ("no program", "a folder"):
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "no sum":
        (tmp_path / "key-sum").unlink()
    elif damage != "no program":
        contents = {"cut": data[:999], "empty": b"", "flipped": bytes([data[0] ^ 1]) + data[1:]}
        path.write_bytes(contents[damage])
    assert programs.get("key") is None
    if damage != "a folder":
        assert not path.exists()
        programs.put("key", data)
        assert programs.get("key") == data


@pytest.mark.parametrize(("limit", "left"), [(10_000, "defghijklm"), (2_500, "lm"), (10, "")])
def test_the_least_recently_used_go_beyond_the_limit(tmp_path, limit, left):
    programs = CompiledPrograms(tmp_path, limit)
    for age, key in enumerate("abcdefghijklm"):
        programs.put(key, bytes(1000))
        for path in tmp_path.glob(f"{key}-*"):
            os.utime(path, (age, age))
    programs.put("m", bytes(1000))
    assert {path.name for path in tmp_path.iterdir()} == {f"{key}-{kind}" for key in left for kind in ("cache", "sum")}


@pytest.mark.parametrize("where", ["/proc/no/such", "/dev/null/x"])
def test_a_folder_that_cannot_be_written_is_one_message(where, capsys):
    programs = CompiledPrograms(pathlib.Path(where), 1000)
    for key in "abc":
        programs.put(key, b"x")
        assert programs.get(key) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compiled programs cannot be kept in {where}, so each start takes longer: ")


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Where programs may lie: a checkout, a cache, a home and temporary files."""
    monkeypatch.setattr(caches, "_CHECKOUT", tmp_path / "checkout")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(caches, "cache_folder", cache_folder.__wrapped__)
    (tmp_path / "file").touch()
    return tmp_path


def test_programs_lie_in_the_checkout_the_users_cache_or_among_the_temporary_files(places, monkeypatch, capsys):
    assert caches.cache_folder() == places / "checkout" / ".jax_cache"
    monkeypatch.setattr(caches, "_CHECKOUT", places / "file")
    assert caches.cache_folder() == places / "home/.cache/apr_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "xdg"))
    assert caches.cache_folder() == places / "xdg/apr_jax"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "file"))
    monkeypatch.setenv("HOME", str(places / "file"))
    assert caches.cache_folder() == places / f"apr_jax-{os.getuid()}"
    assert f"kept in {places}/apr_jax-{os.getuid()}, because {places}/file/.jax_cache and " in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_in_which_others_may_write_is_not_trusted(places, monkeypatch, mode, capsys):
    monkeypatch.setattr(caches, "_CHECKOUT", places / "file")
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home or an entry in passwd
    (places / f"apr_jax-{os.getuid()}").mkdir()
    (places / f"apr_jax-{os.getuid()}").chmod(mode)
    assert caches.cache_folder() is None
    assert "set JAX_COMPILATION_CACHE_DIR" in capsys.readouterr().err


COMPILES = """
import sys, warnings; warnings.simplefilter("error")
import jax, jax.numpy as jnp
from apr_jax.config import MeshConfig
from apr_jax.parallel.mesh import make_mesh
make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8))).sum()) > 0, len(hits) > 0)
"""


@pytest.mark.heavy
def test_jax_compiles_again_what_is_damaged_and_says_nothing(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",  # one device, none of them idle
    }

    def compile_it():
        command = [sys.executable, "-c", COMPILES]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.strip()

    assert compile_it() == "True False"
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*-cache")}
    assert compile_it() == "True True"
    for path in tmp_path.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:-5])
    assert compile_it() == "True False"
    assert {path.name for path in tmp_path.glob("*-cache")} == set(kept)
    assert compile_it() == "True True"


@pytest.mark.heavy
def test_compiled_programs_are_kept_in_an_object_store(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{PACKAGES}:{ROOT}",
        "OBJECT_STORE": str(tmp_path / "objects"),
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",  # one device, none of them idle
    }
    for answer in ("True False", "True True"):
        command = [sys.executable, "-c", COMPILES]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.stdout.strip(), done.stderr) == (answer, "")
    assert list((tmp_path / "objects" / "bucket" / "compiled").glob("*-cache"))
    assert not (tmp_path / "gs:").exists()


HOMELESS = """
import importlib, os, pkgutil, pwd, runpy, sys
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
import apr_jax
for module in pkgutil.walk_packages(apr_jax.__path__, "apr_jax."):
    if not module.name.startswith(("apr_jax.aot", "apr_jax.bench")):
        importlib.import_module(module.name)
sys.argv = ["launch/generate_data.py", "--num_problems=2", "--config.data.num_workers=1"]
runpy.run_path("launch/generate_data.py", run_name="__main__")
"""


@pytest.mark.heavy
def test_a_user_without_a_home_or_an_entry_in_passwd_is_one_like_others(tmp_path):
    gone = ("HOME", "USER", "LOGNAME", "USERNAME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "GLIBC_TUNABLES": ""}
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 problems in" in done.stdout
    assert "Traceback" not in done.stderr
