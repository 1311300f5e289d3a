"""What happened: progress while it does, and a summary afterwards."""

from bitpress.report.progress import progress_display
from bitpress.report.summary import summarize

__all__ = ["progress_display", "summarize"]
