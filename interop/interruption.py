"""Ctrl-C and SIGTERM that cannot get lost.

Python raises `KeyboardInterrupt` wherever the main thread happens to be. Raised inside a callback,
such as jaxlib's of the garbage collector, it would be printed as "Exception ignored" and forgotten;
native code that calls back may turn it into an error of its own. So a signal is also remembered,
and a long run asks for it between its steps.
"""

import contextlib
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a scheduler sends the second
_asked: int | None = None  # the first signal that came
_deferred = False  # whether it waits for `check`


def _unraisable(hook: Callable[[Any], object], swallowed: Any) -> None:
    """Passes on what a callback swallowed, unless it is an interrupt that is remembered."""
    if _asked is None or not issubclass(swallowed.exc_type, KeyboardInterrupt):
        hook(swallowed)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = _asked or number
    if not _deferred:
        raise KeyboardInterrupt


def quiet_while_importing(package: str) -> None:
    """Ctrl-C ends `python -m package.command` without a traceback until `ended` listens.

    To be called first by the package. It changes nothing in any other program.

    Args:
        package: Whose commands all pass through `ended`.
    """
    is_ours = any(
        flag == "-m" and name.startswith(f"{package}.")
        for flag, name in itertools.pairwise(sys.orig_argv)
    )
    if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within the block both signals raise `KeyboardInterrupt`, and `check` does so again.

    A signal that the parent had this process ignore stays ignored, as Python keeps it too. For the
    main thread only, which is where Python runs handlers. A block inside of another adds nothing.
    """
    global _asked
    if _interrupt in map(signal.getsignal, _SIGNALS):
        yield
        return
    _asked = None
    heard = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    before = [(one, signal.signal(one, _interrupt)) for one in heard]
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unraisable, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for one, handler in before:
            signal.signal(one, handler)
        _asked = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the block, a short one, a signal that `remembered` hears is raised at its end.

    For code that catches `KeyboardInterrupt`, shows it as an error of its own, and goes on.
    """
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before
    check()


@contextlib.contextmanager
def undisguised() -> Iterator[None]:
    """Within the block an error that a signal was turned into is `KeyboardInterrupt` again."""
    try:
        yield
    except Exception:
        check()
        raise


def check() -> None:
    """Raises what a signal asked for, if something swallowed it.

    Raises:
        KeyboardInterrupt: A signal came within `remembered`.
    """
    if _asked is not None:
        raise KeyboardInterrupt


def acknowledge() -> int:
    """Forgets what a signal asked for, now that it is done; a further signal interrupts again.

    Returns:
        The exit code that shells know the signal by: 130 for Ctrl-C, 143 for SIGTERM.
    """
    global _asked
    number, _asked = _asked or signal.SIGINT, None
    return 128 + number


def ended(main: Callable[[], int | None]) -> int:
    """Runs a command; what ends it from outside is an exit code and a line, never a traceback.

    Args:
        main: The command.

    Returns:
        Its exit code, that of a signal as `acknowledge` has it, or 141 where what reads its output
        has ended first, as `head` does.
    """
    with remembered():
        try:
            code = main() or 0
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return acknowledge()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            return 128 + signal.SIGPIPE
    return code


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with the exit code of `ended`.

    After a signal nothing but the output is flushed: a thread of JAX that still runs what was
    interrupted may crash while Python tears down what it uses.
    """
    code = ended(main)
    if code in {128 + one for one in _SIGNALS}:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
