"""Which errors a user can mend, and what to say of them; every other error is a bug, and keeps its traceback."""

from __future__ import annotations

import dis
from pathlib import Path
from types import TracebackType

_PACKAGE = str(Path(__file__).parent)
_RAISE = dis.opmap["RAISE_VARARGS"]


def foreseen(error: BaseException) -> str | None:
    """The message for an error that the user can mend; None for one that nobody foresaw.

    Foreseen is what a `raise` statement of this package raised, since its message was written for the user; what the
    operating system refused (a full disk, a missing permission); and running out of memory.
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"out of memory ({text.partition(chr(10))[0]}): a smaller data.batch_size needs less"
    if _deliberate(error):
        return text
    if isinstance(error, OSError) and error.strerror is not None:
        place = error.filename if error.filename2 is None else error.filename2  # where it was copied to
        return f"{place}: {error.strerror}" if place is not None else error.strerror
    return None


def passes_through_package(trace: TracebackType | None, but: str) -> bool:
    """Whether a traceback has a frame in a file of this package other than `but`."""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(_PACKAGE) and file != but:
            return True
        trace = trace.tb_next
    return False


def _deliberate(error: BaseException) -> bool:
    """Whether a `raise` statement of this package raised it, rather than a mistake of ours or a library."""
    trace = error.__traceback__
    if trace is None or isinstance(error, AssertionError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return code.co_filename.startswith(_PACKAGE) and code.co_code[trace.tb_lasti] == _RAISE
