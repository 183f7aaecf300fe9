"""What every command does with a mistake of its user: say it once, plainly, and end with exit code 2; with 1 where it
is no mistake, but a disk or a folder that cannot be used."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from data_pipelines import DataError
from engine.config import ConfigError
from engine.safety.answers import TrainingDivergedError
from engine.safety.checkpoint import CheckpointError
from engine.safety.saving import NotSavedError
from launch.parsing import say
from models import WeightsError


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors that are the user's to mend into one message, without a traceback: from rank 0, or from the others
    where rank 0 has not ended by the same."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError, WeightsError, TrainingDivergedError, FileNotFoundError) as error:
        say(_reason(error))
        sys.exit(2)
    except NotSavedError as error:
        say(str(error))
        sys.exit(3)
    except OSError as error:
        # torchrun says at its end which rank failed first, and of what.
        get_error_handler().record_exception(error)
        say(_reason(error))
        sys.exit(1)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


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
