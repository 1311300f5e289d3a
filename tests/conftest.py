"""Property tests explore new examples on a developer's machine, and are repeatable where a change is judged."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
