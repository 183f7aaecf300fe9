"""Runs the commands of `launch/` in this process."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys


def run_command(name: str, *arguments: str, check: bool = True) -> tuple[int, str, str]:
    """Calls `launch/NAME.py` with arguments.

    Returns:
        The exit code and what it printed to stdout and stderr.
    """
    main = importlib.import_module(f"launch.{name}").main
    before, code = sys.argv, 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        sys.argv = [f"launch/{name}.py", *arguments]
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.argv = before
    if check:
        assert code == 0, err.getvalue()
    return code, out.getvalue(), err.getvalue()
