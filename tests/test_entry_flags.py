"""The command line is checked whole before any work: config files that are none, numbers out of range, outputs."""

import pathlib

import pytest
from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError
from tests.launch.test_evaluate import ROOT, launched

FILES: dict[str, tuple[str | bytes, str]] = {
    "syntax.py": ("def get_config(\n", "SyntaxError '(' was never closed"),
    "words.py": ("root:x:0:0:root:/root:/bin/bash\n", "SyntaxError invalid syntax"),
    "latin.py": (b"\xff\xfe = 1\n", "SyntaxError (unicode error) 'utf-8' codec"),
    "nul.py": (b"\0\0", "null bytes"),
    "empty.py": ("", "has no function get_config"),
    "without.py": ("x = 1\n", "has no function get_config"),
    "number.py": ("get_config = 5\n", "has no function get_config"),
    "imports.py": ("from nowhere import it\n", "ModuleNotFoundError No module named 'nowhere'"),
    "raises.py": ("def get_config():\n    raise RuntimeError('one\\ntwo')\n", "RuntimeError one two"),
    "asserts.py": ("def get_config():\n    assert False, 'never'\n", "AssertionError never"),
    "divides.py": ("1 / 0\n", "ZeroDivisionError division by zero"),
    "exits.py": ("raise SystemExit(3)\n", "SystemExit 3"),
    "recursion.py": ("def get_config():\n    return get_config()\n", "RecursionError maximum recursion depth"),
    "nothing.py": ("def get_config():\n    pass\n", "its get_config returns NoneType, and no ConfigDict"),
    "a_dict.py": ("def get_config():\n    return {}\n", "its get_config returns dict, and no ConfigDict"),
    "attribute.py": ("import sys\ndef get_config():\n    return sys.nothing\n", "AttributeError module 'sys' has no"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_config_file_is_told_in_a_line_with_its_name(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        entry._check_config_file(str(path))
    assert str(error.value).startswith(f"--config={path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "there is no such file"),
        (":smoke", "there is no such file"),
        ("missing.py", "there is no such file"),
        (str(pathlib.Path(__file__).parent), "there is no such file"),
        ("/dev/null", "there is no such file"),
        ("a\0b", "there is no such file"),
        ("x" * 5000, "too long"),
        (f"{ROOT}/configs/grpo.py:lap", "no such variant; choose one of laptop, smoke, paper, paper_gqa, 7b"),
        (f"{ROOT}/configs/grpo.py:", "no such variant"),
        (f"{ROOT}/configs/nested_sums.py:smoke", "takes 0 positional arguments but 1 was given"),
    ],
)
def test_a_config_or_a_variant_that_is_not_there_is_told(given, message):
    with pytest.raises(ConfigError, match=message):
        entry._check_config_file(given)


def test_good_config_files_pass():
    for given in ("configs/grpo.py", "configs/grpo.py:smoke", "configs/nested_sums.py"):
        entry._check_config_file(str(ROOT / given))


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--config=a.py"], ["a.py"]),
        (["-config", "a.py:x"], ["a.py:x"]),
        (["--config=a.py", "--config=b.py"], ["a.py", "b.py"]),
        (["--config.seed=1", "--configs=3", "--", "--config=a.py"], []),
        (["--config"], [""]),
    ],
)
def test_the_config_is_found_on_the_command_line(arguments, given):
    assert list(entry._given_configs(arguments)) == given


@pytest.mark.parametrize("value", ["/etc/passwd", "", "exits.py"])
def test_a_program_ends_at_once_with_exit_code_2(tmp_path, value):
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    done = launched("generate_data.py", tmp_path, f"--config={value}", check=2)
    assert f"--config={value}: " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def values(monkeypatch):
    """Flags of their own, defined by `entry`."""
    own = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", own)
    for define in ("DEFINE_integer", "DEFINE_float", "DEFINE_string"):
        plain = getattr(flags, define)
        monkeypatch.setattr(flags, define, lambda *args, plain=plain: plain(*args, flag_values=own))
    register = flags.register_validator
    monkeypatch.setattr(flags, "register_validator", lambda name, check: register(name, check, flag_values=own))
    return own


@pytest.mark.parametrize("value", ["-1", "0", "1e300", "nan", "inf", str(2**31), str(2**63), "x", "", "1.5", "True"])
def test_a_whole_number_out_of_range_is_refused(values, value):
    entry.define_number("number", 3, "A number.", low=1)
    with pytest.raises(flags.Error):
        values(["program", f"--number={value}"])


@pytest.mark.parametrize("value", ["-1e-9", "-1", "nan", "inf", "-inf", "1e7", "x", ""])
def test_a_number_out_of_range_is_refused(values, value):
    entry.define_number("number", None, "A number.", low=0.0)
    with pytest.raises(flags.Error):
        values(["program", f"--number={value}"])


def test_numbers_in_range_are_taken(values):
    whole, share = entry.define_number("whole", None, "", low=2), entry.define_number("share", 0.5, "", low=0.0)
    values(["program", "--whole=2", "--share=0"])
    assert (whole.value, share.value) == (2, 0.0)
    values(["program", f"--whole={2**31 - 1}", "--share=1e6"])
    assert (whole.value, share.value) == (2**31 - 1, 1e6)


@pytest.mark.parametrize("text", ["0", "-1", "1,x", "9" * 5000, "\u0663", "1.5", "nan", str(10**9)])
def test_a_list_of_what_are_no_positive_numbers_is_refused(text):
    with pytest.raises(ConfigError, match="must be positive whole numbers") as error:
        entry.positive_numbers("lanes", text.split(","))
    assert len(str(error.value)) < 300


def test_a_folder_that_cannot_be_made_is_refused(values, tmp_path):
    entry.define_folder("folder", "A folder.")
    (tmp_path / "file").write_text("")
    for good in (tmp_path, tmp_path / "new", tmp_path / "new" / "deeper"):
        values(["program", f"--folder={good}"])
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(flags.Error, match="no folder can be made there"):
            values(["program", f"--folder={bad}"])


def test_a_folder_or_a_file_with_an_ending(values, tmp_path):
    entry.define_folder("out", "A folder, or FILE.gguf.", ".gguf")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gguf").mkdir()
    for good in (tmp_path / "new", tmp_path / "model.gguf", tmp_path / "new" / "model.gguf"):
        values(["program", f"--out={good}"])
    for bad, message in (("file/model.gguf", "no folder can be made there"), ("folder.gguf", "name a file in it")):
        with pytest.raises(flags.Error, match=message):
            values(["program", f"--out={tmp_path / bad}"])


def test_every_number_and_output_of_a_launch_program_is_checked():
    for path in [*(ROOT / "launch").glob("*.py")]:
        text = path.read_text()
        assert "flags.DEFINE_integer" not in text, path
        assert "flags.DEFINE_float" not in text, path
        for name in ("json", "rollouts", "output", "plot", "figure", "out", "hlo", "screenshots"):
            assert f'DEFINE_string("{name}"' not in text.replace("(\n    ", "("), (path, name)
