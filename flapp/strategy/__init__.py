"""Flower strategies and the maths they rest on."""

from flapp.strategy.fedavg import FedAvg

__all__ = ["FedAvg"]
