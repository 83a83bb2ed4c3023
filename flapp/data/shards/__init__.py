"""Shards: the samples of each client in a folder of its own, and the manifest of all of them.

Reading order: source and leaf (the sources), client (one shard), manifest, build (all shards), dataset (for PyTorch).
"""
