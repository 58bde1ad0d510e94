"""Run a file or a module in this process as `python FILE` and `python -m MODULE` do.

The script gets its own `__main__` module, `sys.argv` and `sys.path[0]`. It is a fresh module, not ours and not a copy
that is thrown away (as in `runpy.run_path`): what the script pickles, and processes that it spawns, find `__main__` by
name.
"""

from __future__ import annotations

import builtins
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, TracebackType

from memfit.errors import UsageError


def check(command: Sequence[str]) -> None:
    """Refuse a command that Python would refuse, before anything is set up.

    Raises:
        UsageError: There is no script, or it is not a file.
    """
    if not command:
        raise UsageError("No script to run. Write `memfit run --budget 6GiB -- train.py`, or `-- -m package.module`.")
    if command[0] == "-m":
        if len(command) < 2:
            raise UsageError("`-m` needs the name of a module, as in `memfit run -- -m package.module`.")
    elif command[0].startswith("-"):
        raise UsageError(f"`{command[0]}` is neither a script nor `-m`. Options of Memfit come before the `--`.")
    elif not os.path.exists(command[0]):
        raise UsageError(f"There is no file `{command[0]}` in `{os.getcwd()}`.")


def run(command: Sequence[str]) -> None:
    """Run `FILE ARGS...` or `-m MODULE ARGS...`.

    Whatever the script raises comes out, `SystemExit` and `KeyboardInterrupt` included; a traceback that reaches the
    top shows the script's frames only.
    """
    check(command)
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    try:
        if command[0] == "-m":
            _run_module(list(command[1:]))
        else:
            _run_file(list(command), main)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException:
        sys.excepthook = _ScriptFramesOnly(sys.excepthook, main)
        raise


def _run_module(argv: list[str]) -> None:
    # Python itself puts "-m" into argv[0] while it looks for the module.
    sys.argv[:] = ["-m", *argv[1:]]
    _set_first_path(os.getcwd())
    # This is the function that `python -m` calls, in every Python since 2.5.
    runpy._run_module_as_main(argv[0])  # type: ignore[attr-defined]


def _run_file(argv: list[str], main: ModuleType) -> None:
    sys.argv[:] = argv
    path = argv[0]
    if os.path.isdir(path) or _is_archive(path):
        _set_first_path(os.path.abspath(path))
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        return
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    # As Python: absolute, but not normalised.
    main.__file__ = os.path.join(os.getcwd(), path)
    main.__loader__ = SourceFileLoader("__main__", main.__file__)
    main.__dict__["__cached__"] = None
    exec(_compile(main.__file__), main.__dict__)


def _is_archive(path: str) -> bool:
    from zipfile import is_zipfile

    return not path.endswith((".py", ".pyc")) and is_zipfile(path)


def _compile(path: str) -> CodeType:
    with io.open_code(path) as file:
        code: CodeType | None = pkgutil.read_code(file)
    if code is None:
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
    return code


def _set_first_path(folder: str) -> None:
    # `python -P` puts nothing there, neither for us nor for the script.
    if not sys.flags.safe_path:
        sys.path[0] = folder


class _ScriptFramesOnly:
    """An `excepthook` that leaves out the frames which started the script."""

    def __init__(
        self,
        hook: Callable[[type[BaseException], BaseException, TracebackType | None], object],
        main: ModuleType,
    ) -> None:
        self._hook = hook
        self._main = main

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        frame = traceback
        while frame is not None and frame.tb_frame.f_globals is not self._main.__dict__:
            frame = frame.tb_next
        if frame is None and not isinstance(error, SyntaxError):
            frame = traceback
        self._hook(kind, error.with_traceback(frame), frame)
