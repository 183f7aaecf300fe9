"""The networks: what they are called, how they are built, and where their pooled features are."""

from models.errors import UnknownNetwork, WeightsError
from models.exported import ExportError, load_network, same_outputs, save_network
from models.features import classifier_weights, parameter_count, pooled_features
from models.registry import check, create, names
from models.trying import try_images

__all__ = [
    "ExportError",
    "UnknownNetwork",
    "WeightsError",
    "check",
    "classifier_weights",
    "create",
    "load_network",
    "names",
    "parameter_count",
    "pooled_features",
    "same_outputs",
    "save_network",
    "try_images",
]
