"""What calibration remembers of a layer's inputs."""

from bitpress.statistics.collector import InputCollector
from bitpress.statistics.inputs import InputStatistics, Statistic, merge_all, pooled

__all__ = ["InputCollector", "InputStatistics", "Statistic", "merge_all", "pooled"]
