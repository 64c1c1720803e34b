"""r1pipe: the R1 recipe for everyone, from cold start to a distilled student."""

__version__ = "0.1.0"
