"""What every command does with a mistake of its user: say it once, plainly, and end with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator

from data_pipelines import DataError
from engine.checkpoint import CheckpointError
from engine.collectives import Launch
from engine.config import ConfigError
from engine.trainer import TrainingDivergedError


@contextlib.contextmanager
def user_errors(launch: Launch) -> Iterator[None]:
    """Turns errors that are the user's to mend into one message from rank 0, without a traceback."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError, TrainingDivergedError, FileNotFoundError) as error:
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            # torchrun ends the others as soon as one rank has ended: rank 0 shall have spoken by then.
            time.sleep(10)
        sys.exit(2)


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """An argument parser whose help keeps its line breaks."""
    return argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
