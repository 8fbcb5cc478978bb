"""Local Linear Attention, compiled: a planner, backends, a tuner and a database of tuned plans."""

from lla_compile.spec import LLASpec

__version__ = "0.1.0"
__all__ = ["LLASpec"]
