"""What every command does with a mistake of its user: say it once, plainly, and end with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from data_pipelines import DataError
from engine.config import ConfigError
from engine.ranks.collectives import Launch
from engine.safety.answers import TrainingDivergedError
from engine.safety.checkpoint import CheckpointError
from models import WeightsError


@contextlib.contextmanager
def user_errors(launch: Launch) -> Iterator[None]:
    """Turns errors that are the user's to mend into one message from rank 0, without a traceback."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError, WeightsError, TrainingDivergedError, FileNotFoundError) as error:
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            # torchrun ends the others as soon as one rank has ended: rank 0 shall have spoken by then.
            time.sleep(10)
        sys.exit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown, _, first = message.partition(": ")
        if unknown == "unrecognized arguments":
            near = difflib.get_close_matches(first.split()[0], self._option_string_actions, n=1)
            message += f"; did you mean {near[0]!r}?" if near else ""
        with user_errors(Launch.from_environment()):
            raise ConfigError(f"{message}\n{self.format_usage().rstrip()}")
        raise AssertionError


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """An argument parser whose help keeps its line breaks, whose options are written out, and whose rank 0 speaks."""
    return _Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
