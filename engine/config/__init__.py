"""What a run is: its keys, files and overrides, and which run a config is of."""

from engine.config.schema import ConfigError, RunConfig
from engine.config.sections import HealthConfig, OptimizerConfig, PeerConfig, ScheduleConfig

__all__ = ["ConfigError", "HealthConfig", "OptimizerConfig", "PeerConfig", "RunConfig", "ScheduleConfig"]
