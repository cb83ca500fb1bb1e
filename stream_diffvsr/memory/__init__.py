"""How a frame fits into memory: plans, what they need, what is free, and what happens when that was wrong."""

from .estimate import estimate_memory
from .plan import Plan

__all__ = ["Plan", "estimate_memory"]
