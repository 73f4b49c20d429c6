"""Ctrl-C while a program is still importing: it ends by the signal, without a traceback. To be imported first."""

import os
import signal
import sys
from types import TracebackType


def _end(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, where)
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


sys.excepthook = _end
