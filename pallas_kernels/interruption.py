"""Ctrl-C and SIGTERM that cannot get lost, and output that cannot be written, said in one line.

Python raises `KeyboardInterrupt` wherever the main thread happens to be. Raised inside a callback,
such as jaxlib's of the garbage collector, it would be printed as "Exception ignored" and forgotten;
native code that calls back may turn it into an error of its own. So a signal is also remembered,
and a long run asks for it between its steps.
"""

import contextlib
import errno
import functools
import importlib.util
import io
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a scheduler sends the second
_asked: int | None = None  # the first signal that came
_deferred = False  # whether one that comes now waits for the end of `deferred`
_waiting = False  # whether one does


def _unraisable(hook: Callable[[Any], object], swallowed: Any) -> None:
    """Passes on what a callback swallowed, unless it is an interrupt that is remembered."""
    if _asked is None or not issubclass(swallowed.exc_type, KeyboardInterrupt):
        hook(swallowed)


def _is_no_interrupt(record: logging.LogRecord) -> bool:
    """Leaves out what JAX logs of a host callback that was interrupted, the interpreter's too."""
    kind = record.exc_info[0] if record.exc_info else None
    return _asked is None or kind is None or not issubclass(kind, KeyboardInterrupt)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    global _asked, _waiting
    _asked = _asked or number
    if not _deferred:
        raise KeyboardInterrupt
    _waiting = True


def before_imports(*packages: str) -> None:
    """Ctrl-C ends `python -m package.command` without a traceback until `ended` listens.

    So does JAX where it is not installed, as outside of the environment. To be called first by the
    packages. It changes nothing in any other program.

    Args:
        *packages: Whose commands all pass through `ended`.
    """
    ours = tuple(f"{package}." for package in packages)
    for flag, name in itertools.pairwise(sys.orig_argv):
        if flag == "-m" and name.startswith(ours):
            if importlib.util.find_spec("jax") is None:
                sys.exit(f"python -m {name}: needs jax: activate its environment (see BUILD.md)")
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within the block both signals raise `KeyboardInterrupt`, and `check` does so again.

    A signal that the parent had this process ignore stays ignored, as Python keeps it too. For the
    main thread only, which is where Python runs handlers. A block inside of another adds nothing.
    """
    global _asked, _waiting
    if _interrupt in map(signal.getsignal, _SIGNALS):
        yield
        return
    _asked, _waiting = None, False
    heard = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    before = [(one, signal.signal(one, _interrupt)) for one in heard]
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unraisable, hook)
    callbacks = logging.getLogger("jax._src.callback")
    callbacks.addFilter(_is_no_interrupt)
    try:
        yield
    finally:
        callbacks.removeFilter(_is_no_interrupt)
        sys.unraisablehook = hook
        for one, handler in before:
            signal.signal(one, handler)
        _asked = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the block, a short one, a signal that `remembered` hears is raised at its end.

    For code that catches `KeyboardInterrupt`, shows it as an error of its own, and goes on. One
    from before the block is not raised again: what is done after it may call such code.
    """
    global _deferred, _waiting
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before
    if _waiting and not _deferred:
        _waiting = False
        raise KeyboardInterrupt


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


class OutputError(Exception):
    """Standard output cannot be written, as on a full disk; no `OSError`, which is a file's."""


class _Output:
    """Standard output, whose errors are known to be its own."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _naming_output():
            return self._stream.write(text)

    def flush(self) -> None:
        with _naming_output():
            self._stream.flush()


@contextlib.contextmanager
def _naming_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"standard output: cannot be written: {reason}") from None


@contextlib.contextmanager
def _watched_output() -> Iterator[None]:
    """Within the block standard output raises `OutputError`; it is flushed where nothing failed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent, as `>&-` does
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name that a C locale lacks
    before = sys.stdout
    watched: Any = _Output(before)
    sys.stdout = watched
    try:
        yield
        watched.flush()
    finally:
        sys.stdout = before


def _drop_output() -> None:
    """Keeps Python from trying once more to write what could not be written, when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _code(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except SystemExit as error:  # of argparse and absl
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0


def ended(main: Callable[[], int | None]) -> int:
    """Runs a command; what ends it from outside is an exit code and a line, never a traceback.

    Args:
        main: The command. It may raise `SystemExit`, too.

    Returns:
        Its exit code, that of a signal as `acknowledge` has it, 141 where what reads its output has
        ended first, as `head` does, or 1 where its output cannot be written, or a disk is full.
    """
    with remembered():
        try:
            with _watched_output(), undisguised():
                code = _code(main)
                check()
                return code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return acknowledge()
        except BrokenPipeError:
            _drop_output()
            return 128 + signal.SIGPIPE
        except OutputError as error:
            _drop_output()
            print(error, file=sys.stderr)
            return 1
        except OSError as error:
            if (said := _full(error)) is None:
                raise
            print(said, file=sys.stderr)
            return 1


def _full(error: OSError) -> str | None:
    """What is said of a full disk where no command knew of its file; None for another error."""
    if error.errno == errno.ENOENT and "No usable temporary directory" in str(error):
        return f"temporary files: cannot be written: {error.strerror}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return f"{error.filename or 'a file'}: cannot be written: {error.strerror}"


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
