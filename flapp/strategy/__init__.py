"""Flower strategies and the maths of aggregation."""

from flapp.strategy.fedavg import FedAvg
from flapp.strategy.fedlora import FedLoRA, global_keys
from flapp.strategy.lora_aggregation import RULES
from flapp.strategy.server_optimizer import ServerOptimizer

__all__ = ["RULES", "FedAvg", "FedLoRA", "ServerOptimizer", "global_keys"]
