"""What happened: progress while it does, and a report afterwards."""

from bitpress.report.page import page
from bitpress.report.progress import progress_display
from bitpress.report.summary import summarize

__all__ = ["page", "progress_display", "summarize"]
