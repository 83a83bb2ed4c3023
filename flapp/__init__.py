"""flapp: a Flower application for federated image models."""

__version__ = "0.1.0"
