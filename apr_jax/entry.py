"""Entry points: flags and configuration in, one message and an exit code out.

    0 done · 1 failed, with a message · 2 bad arguments or config · 75 stopped by a signal, everything finished saved

A bug keeps its traceback and exits with 1.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO

import absl.logging
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import apr_jax.interrupts  # noqa: F401  # before what takes long to import
from apr_jax.caches import cache_folder
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.config_fields import LARGEST_INT, Range
from apr_jax.files import FileError, explain, naming, write
from apr_jax.paths import is_remote, local_path, path_of
from apr_jax.stopping import StoppedAtOnceError, StoppedError, StopSignal

FAILED, BAD_ARGUMENTS, STOPPED = 1, 2, 75  # exit codes
_STANDARD_OUTPUT = "-"  # as the name of a file to write

_CHECKOUT = pathlib.Path(__file__).parents[1]
_LAST_WORDS_SECONDS = 1.0

# All that absl, ml_collections and a config file raise for a wrong flag, file or field.
_PARSE_ERRORS = (flags.Error, AttributeError, ImportError, KeyError, SyntaxError, TypeError, ValueError, OSError)


class FailedError(Exception):
    """The work failed for a reason outside the program. The message says what, and what to do."""


class ConfigFlag:
    """The flag --config with its overrides --config.a.b=c."""

    def __init__(self, holder: flags.FlagHolder[Any]) -> None:
        self._holder = holder

    @property
    def is_given(self) -> bool:
        """True if the command line names a config file."""
        return flags.FLAGS[self._holder.name].present > 0

    @property
    def overrides(self) -> dict[str, Any]:
        """The overridden fields: {"model.num_layers": 2}."""
        return dict(config_flags.get_override_values(flags.FLAGS[self._holder.name]))

    def config_dict(self) -> ConfigDict:
        """Return the config file's values with the overrides applied. Raise ConfigError if the file does not load."""
        try:
            return ConfigDict(self._holder.value.to_dict())
        except OSError as error:
            raise ConfigError(_message(error)) from error

    def values(self) -> dict[str, Any]:
        """Return what `config_dict` does, as a nested dict."""
        values: dict[str, Any] = self.config_dict().to_dict()
        return values

    def config(self) -> Config:
        """Return the values as a Config. Raise ConfigError for values that cannot work."""
        return from_config_dict(self.values())


def define_config(default: str) -> ConfigFlag:
    """Define --config. `default` is a file of configs/, with a variant if wanted: "grpo.py:smoke".

    A config file may import the others (`from configs import grpo`). Overrides are read here already, so a wrong one
    ends the process with code 2 before anything else happens.
    """
    sys.path.insert(0, str(_CHECKOUT))
    path = str(_CHECKOUT / "configs" / default)
    try:
        for given in _given_configs(sys.argv[1:]):
            _check_config_file(given)
        return ConfigFlag(config_flags.DEFINE_config_file("config", path, "Settings: FILE or FILE:VARIANT."))
    except _PARSE_ERRORS as error:
        _exit(ConfigError(_message(error)), BAD_ARGUMENTS)


def _given_configs(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the value of each --config of a command line, which absl has not parsed yet."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name == "--":
            return
        if name in ("-config", "--config"):
            yield value if equals else following


def _check_config_file(given: str) -> None:
    """Raise ConfigError, in one line that names the file, unless FILE:VARIANT is a config file that works.

    ml_collections runs the file once more; what a file raises there has many shapes.
    """
    path, colon, variant = given.partition(":")
    try:
        if not pathlib.Path(path).is_file():
            raise ConfigError("there is no such file")
        code = compile(pathlib.Path(path).read_bytes(), path, "exec")
        names: dict[str, Any] = {"__name__": "config_file", "__file__": path}
        exec(code, names)
        get_config = names.get("get_config")
        if not callable(get_config):
            raise ConfigError("this file of Python has no function get_config")
        config = get_config(variant) if colon else get_config()
        if not isinstance(config, ConfigDict):
            raise ConfigError(f"its get_config returns {type(config).__name__}, and no ConfigDict")
    except ConfigError as error:
        raise ConfigError(f"--config={given}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--config={given}: {explain(error)}") from error
    except (Exception, SystemExit) as error:  # a file of Python may raise anything
        what = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) and what else f"{type(error).__name__} "
        advice = "; a config file is Python, with a function get_config" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"--config={given}: {kind}{what}{advice}") from error


def define_number(
    name: str, default: float | None, help: str, low: float, high: float | None = None
) -> flags.FlagHolder[Any]:
    """Define a flag that takes a number from `low` to `high`, whole if `low` is; None: 2^31 - 1, or 1e6."""
    whole = isinstance(low, int)
    allowed = Range(low, high if high is not None else LARGEST_INT if whole else 1e6)

    def check(value: float | None) -> bool:
        fault = None if value is None else allowed.fault(value)
        if fault:
            raise flags.ValidationError(fault.strip())
        return True

    define: Any = flags.DEFINE_integer if whole else flags.DEFINE_float
    holder: flags.FlagHolder[Any] = define(name, default, help)
    flags.register_validator(name, check)  # type: ignore[no-untyped-call]
    return holder


def define_output(name: str, help: str, endings: Sequence[str] = ()) -> flags.FlagHolder[str | None]:
    """Define a flag that names a file to write.

    A path that cannot be written, or with another ending than these, is refused with the command line, before any work.
    """

    def check(value: str | None) -> bool:
        if value is not None and (endings or value != _STANDARD_OUTPUT):
            _check_output(_flag_path(value), endings)
        return True

    holder = flags.DEFINE_string(name, None, help)
    flags.register_validator(name, check)  # type: ignore[no-untyped-call]
    return holder


def define_folder(name: str, help: str, file_ending: str | None = None) -> flags.FlagHolder[str | None]:
    """Define a flag that names a folder to write into, which need not be there yet; checked as `define_output` does.

    A name with `file_ending` is a file's, whose folder need not be there yet.
    """

    def check(value: str | None) -> bool:
        path = _flag_path(value or ".", "what this program writes")
        if file_ending and path.suffix == file_ending:
            if path.is_dir():
                raise flags.ValidationError("this is a folder; name a file in it")
            path = path.parent
        while not path.exists() and path != path.parent:
            path = path.parent
        if not path.is_dir() or not os.access(path, os.W_OK):
            raise flags.ValidationError(f"no folder can be made there: {path} is no folder that may be written")
        return True

    holder = flags.DEFINE_string(name, None, help)
    flags.register_validator(name, check)  # type: ignore[no-untyped-call]
    return holder


def _flag_path(value: str, local: str | None = None) -> pathlib.Path:
    """Return a flag's path; with `local`, what must lie on this machine, one of this machine. Raise ValidationError."""
    try:
        return path_of(value) if local is None else local_path(value, local)
    except ConfigError as error:
        raise flags.ValidationError(str(error)) from error


def _check_output(path: pathlib.Path, endings: Sequence[str]) -> None:
    if endings and path.suffix not in endings:
        raise flags.ValidationError(f"the name must end in {' or '.join(endings)}")
    if path.is_dir():
        raise flags.ValidationError("this is a folder; name a file in it")
    if is_remote(path):
        return
    if not path.parent.is_dir():
        raise flags.ValidationError(f"there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise flags.ValidationError("this file may not be written; check its permissions")


class JsonFlag:
    """The flag --json=FILE, for one JSON object that other programs read.

    With --json=- the object goes to standard output, and what `main` prints for people to standard error.
    """

    def __init__(self, what: str) -> None:
        self._holder = define_output("json", f"Write {what} here as one JSON object; - is standard output.")

    def write(self, value: Mapping[str, Any]) -> None:
        """Write the object where the command line says, if it says."""
        text = json.dumps(value, indent=1) + "\n"
        if self._holder.value == _STANDARD_OUTPUT:
            with naming(pathlib.Path("standard output")):
                print(text, end="", file=sys.__stdout__, flush=True)
        elif self._holder.value:
            write(path_of(self._holder.value), text.encode())


def positive_numbers(flag: str, values: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of a list flag, which may be empty. Raise ConfigError unless all are positive and whole."""
    given = [value for value in values if value]
    if not all(value.isascii() and value.isdecimal() and len(value) < 10 and int(value) for value in given):
        raise ConfigError(f"--{flag}={','.join(given)[:100]} must be positive whole numbers, below 1e9")
    return tuple(int(value) for value in given)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Parse the command line, which takes flags alone, run `main` and exit with what it returns (None: 0).

    A ConfigError or a wrong command line exits with 2; a FailedError, a FileError or an OSError with 1; a signal
    (`stopping`) with 75 at once, unless `main` handles it.
    """

    def without_words(words: Sequence[str]) -> int | None:
        if words:
            raise ConfigError(f"unknown arguments: {' '.join(words)}")
        return main()

    run_with_words(without_words)


def run_with_words(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Do what `run` does, and hand `main` the words of the command line that are no flags."""
    _prefer_huge_pages()
    _cache_compilations()
    sys.stdout = _Stream(sys.stdout, "standard output", has_results=True)
    sys.stderr = _Stream(sys.stderr, "standard error", has_results=False)
    sys.unraisablehook = _say_unraisable

    def quietly(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            absl.logging.set_verbosity(absl.logging.ERROR)  # libraries log each file that they touch
            absl.logging.get_absl_logger().addFilter(lambda record: not record.exc_info)  # what they raise as well
            logging.getLogger("apr_jax").setLevel(logging.WARNING)
        with _standard_output_for_programs():
            code = main(argv[1:])
        sys.stdout.flush()
        return code

    try:
        with StopSignal(StoppedAtOnceError).listening() as stop, stop.interrupting():
            app.run(quietly, flags_parser=_parse)
    except StoppedError as error:
        _exit(error, STOPPED)
    except ConfigError as error:
        _exit(error, BAD_ARGUMENTS)
    except (FailedError, FileError) as error:
        _exit(error, FAILED)
    except OSError as error:
        _exit(FailedError(explain(error)), FAILED)
    except Exception:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        _leave(FAILED)
    sys.exit(0)


class _Stream(io.TextIOBase):
    """Standard output or standard error, whose reader may go away or whose disk may fill.

    What is printed for people is lost then, and the work goes on. A result that cannot be printed is an OSError.
    """

    def __init__(self, stream: TextIO, name: str, *, has_results: bool) -> None:
        self._stream, self._name, self._has_results = stream, name, has_results

    def write(self, text: str) -> int:
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())  # or Python would try once more at the end
            if self._has_results:
                error.filename = self._name
                raise

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def _say_unraisable(what: "sys.UnraisableHookArgs") -> None:
    """Do what Python does, but ignore callbacks that come after Orbax has given up writing and said why."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _standard_output_for_programs() -> contextlib.AbstractContextManager[Any]:
    """Send what is printed to standard error if the command line wants the JSON object alone on standard output."""
    wanted = "json" in flags.FLAGS and flags.FLAGS["json"].value == _STANDARD_OUTPUT
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def _prefer_huge_pages() -> None:
    """Restart the process with huge pages for glibc's malloc, once and on Linux only.

    XLA's CPU programs take fresh memory at every call, and page faults of 4 KiB slow training down
    (docs/performance.md). A GLIBC_TUNABLES that is set already stays as it is.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _cache_compilations() -> None:
    """Keep what XLA compiles (`caches`), so that a second process starts in half the time.

    JAX's own variables take precedence.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := cache_folder()) is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _parse(argv: list[str]) -> list[str]:
    try:
        return list(flags.FLAGS(argv))
    except _PARSE_ERRORS as error:
        raise ConfigError(_message(error)) from error


def _message(error: BaseException) -> str:
    """Return one line that says what is wrong, out of a nested error or a quoted traceback."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if "Traceback (most recent call last)" in text:
        return text.splitlines()[-1].partition(": ")[2]
    text = "; ".join(line.strip() for line in text.splitlines())
    return f"no such config field: {text}" if isinstance(error, AttributeError | KeyError) else text


def _exit(error: BaseException, code: int) -> NoReturn:
    print(f"{sys.argv[0]}: {error}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process. A failing host does not wait at the exit for the others, which will not come."""
    if _is_one_of_several():
        time.sleep(_LAST_WORDS_SECONDS)  # others with the same complaint would be aborted without host 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    """Return True if this process has joined a job of several hosts (`parallel.hosts.joined`)."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
