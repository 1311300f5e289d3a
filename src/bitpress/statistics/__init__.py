"""What calibration remembers of a layer's inputs."""

from bitpress.statistics.collector import InputCollector
from bitpress.statistics.inputs import InputStatistics, Statistic, pooled

__all__ = ["InputCollector", "InputStatistics", "Statistic", "pooled"]
