"""The networks: what they are called, how they are built, and where their pooled features are."""

from models.errors import UnknownNetwork
from models.features import parameter_count, pooled_features
from models.registry import check, create, names

__all__ = ["UnknownNetwork", "check", "create", "names", "parameter_count", "pooled_features"]
