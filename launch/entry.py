"""What every command does with a mistake of its user: say it once, plainly, and end with exit code 2; with 1 where it
is no mistake, but a disk or a folder that cannot be used."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from data_pipelines import DataError
from engine.config import ConfigError, RunConfig
from engine.ranks.collectives import Launch
from engine.safety.answers import TrainingDivergedError
from engine.safety.checkpoint import CheckpointError
from engine.safety.saving import NotSavedError
from launch.with_parent import obey_signals
from models import WeightsError


@contextlib.contextmanager
def user_errors(launch: Launch) -> Iterator[None]:
    """Turns errors that are the user's to mend into one message, without a traceback: from rank 0, or from the others
    where rank 0 has not ended by the same."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError, WeightsError, TrainingDivergedError, FileNotFoundError) as error:
        _say(launch, _reason(error))
        sys.exit(2)
    except NotSavedError as error:
        _say(launch, str(error))
        sys.exit(3)
    except OSError as error:
        # torchrun says at its end which rank failed first, and of what.
        get_error_handler().record_exception(error)
        _say(launch, _reason(error))
        sys.exit(1)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _say(launch: Launch, message: str) -> None:
    if launch.rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
        return
    # torchrun ends the others as soon as one rank has ended: rank 0 shall have spoken by then, and there is no run that
    # its signal should wait for.
    obey_signals()
    time.sleep(10)
    print(f"error: rank {launch.rank} on {socket.gethostname()}: {message}", file=sys.stderr, flush=True)


_TASKS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
"""Where a launcher that is not torchrun says which of how many tasks this is."""


def require_torchrun(command: str) -> None:
    """A process that is one of several, but not by torchrun, would take itself for the only one.

    Args:
        command: what is run, such as launch/train.py.

    Raises:
        ConfigError: with what to type.
    """
    if "RANK" in os.environ:
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']} without RANK: expected both, as torchrun sets them, or neither: "
            f"torchrun --nproc-per-node=GPUS {command} ..., or env -u WORLD_SIZE python {command} ..."
        )
    for task, size in _TASKS:
        tasks = os.environ.get(size, "")
        if task in os.environ and tasks.isdecimal():
            if int(tasks) > 1:
                raise ConfigError(
                    f"{size} = {tasks}: each of these {tasks} tasks would train alone, as rank 0, in one folder. Start "
                    f"torchrun once on each node, and it starts the ranks: slurm/submit.sh does that, or type\n"
                    f"  srun --ntasks-per-node=1 torchrun --nnodes=NODES --nproc-per-node=GPUS --rdzv-backend=c10d "
                    f"--rdzv-endpoint=FIRST_NODE:29500 {command} ...\n"
                    f"or, if one process is meant: env -u {task} python {command} ..."
                )
            return


class Parser(argparse.ArgumentParser):
    """Says mistakes as `user_errors` does."""

    def parse_words(self) -> tuple[argparse.Namespace, str | None, list[str]]:
        """The options of the command line; the first word without `=` that belongs to none, and all other such words.

        `--section.key=value` and `--section.key value`, as other programs write it, are words `section.key=value`.
        """
        given, arguments = list(sys.argv[1:]), []
        while given:
            word = given.pop(0)
            key, equals, _ = word.removeprefix("--").partition("=")
            if not word.startswith("--") or f"--{key}" in self._option_string_actions or not _is_key(key):
                arguments.append(word)
            elif equals:
                arguments.append(word.removeprefix("--"))
            elif given and not given[0].startswith("--") and "=" not in given[0]:
                arguments.append(f"{key}={given.pop(0)}")
            else:
                self.error(f"{word}: expected a value, such as {word}=VALUE")
        options = self.parse_intermixed_args(arguments)
        words: list[str] = options.words
        subject = next((word for word in words if "=" not in word), None)
        if subject is not None:
            words.remove(subject)
        return options, subject, words

    def add_words(self, first: str, means: str) -> None:
        """Declares what `parse_words` returns: `first` is what the command is about."""
        self.add_argument(
            "words", nargs="*", metavar=first, help=f"{means}, and section.key=value over those of the file"
        )

    def error(self, message: str) -> NoReturn:
        unknown, _, first = message.partition(": ")
        if unknown == "unrecognized arguments":
            near = difflib.get_close_matches(first.split()[0], self._option_string_actions, n=1)
            message += f"; did you mean {near[0]!r}?" if near else ""
        with user_errors(Launch.from_environment()):
            raise ConfigError(f"{message}\n{self.format_usage().rstrip()}")
        raise AssertionError


def _is_key(key: str) -> bool:
    """Whether a word is meant as a key of a config, rightly written or not."""
    section, dot, _ = key.partition(".")
    return bool(re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key)) and (bool(dot) or section in RunConfig.model_fields)


def parser(description: str, epilog: str) -> Parser:
    """An argument parser whose help keeps its line breaks, whose options are written out, and whose rank 0 speaks."""
    return Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
