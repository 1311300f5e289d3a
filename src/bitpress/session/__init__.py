"""One compression from its recipe to its result."""

from bitpress.session.recipe import Recipe
from bitpress.session.session import Session

__all__ = ["Recipe", "Session"]
