"""Where the batches come from: a resident tensor for 28x28 and 32x32 images, DALI for folders of JPEG files.

Order and augmentation of step t are a function of (seed, epoch, t) alone (see :mod:`data_pipelines.order`), so the
number of ranks, of threads and of rows that a rank takes never changes what the cohort sees.
"""

from data_pipelines import order
from data_pipelines.config import DataConfig
from data_pipelines.contract import Batch, DataError, Pipeline
from data_pipelines.matching import open_validation
from data_pipelines.opening import Sizes, check_files, open_pipeline

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "Pipeline",
    "Sizes",
    "check_files",
    "open_pipeline",
    "open_validation",
    "order",
]
