"""Runs launch/train.py and sends it a signal at a chosen moment, so that no test depends on how fast a machine is.

    python -m tests.launch.disturbed SIGNAL MOMENT --workdir=WORKDIR ...     # the rest as for launch/train.py

    files:37                                just before the run touches files below WORKDIR for the 37th time: opens one
                                            to write, makes, renames or removes one, in whichever thread
    apr_jax.train.rl.sample.choose_problems:3        when this function is called for the third time
    never                                   not at all

At its end, a run that came to it writes how often it touched files to WORKDIR.touched.
"""

import importlib
import os
import pathlib
import runpy
import signal
import sys
import threading

_PATHS = {"open": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,)}


class Files:
    """Counts what touches files below a folder; an audit hook."""

    def __init__(self, folder, number, at):
        self.count = 0
        self._folder, self._number, self._at, self._lock = folder, number, at, threading.Lock()

    def __call__(self, event, arguments):
        if event not in _PATHS or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if any(str(arguments[index]).startswith(self._folder) for index in _PATHS[event]):
            with self._lock:
                self.count += 1
                if self.count == self._at:
                    os.kill(os.getpid(), self._number)


def at_call(name, number, at):
    """Sends the signal when the function is called for the `at`-th time."""
    module, _, function = name.rpartition(".")
    module, calls = importlib.import_module(module), 0
    original = getattr(module, function)

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(module, function, counted)


def main():
    name, moment, *arguments = sys.argv[1:]
    workdir = next(argument.partition("=")[2] for argument in arguments if argument.startswith("--workdir="))
    what, _, at = moment.partition(":")
    files = Files(workdir + os.sep, signal.Signals[name], int(at) if what == "files" else -1)
    sys.addaudithook(files)
    if what not in ("files", "never"):
        at_call(what, signal.Signals[name], int(at))
    launch = pathlib.Path(__file__).parents[2] / "launch" / "train.py"
    sys.argv = [str(launch), *arguments]
    try:
        runpy.run_path(str(launch), run_name="__main__")
    finally:
        pathlib.Path(workdir + ".touched").write_text(str(files.count))


if __name__ == "__main__":
    main()
