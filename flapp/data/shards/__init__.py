"""Shards: the samples of each client in a folder of its own, and the manifest of all of them.

Reading order: source, leaf and decoded (the sources), assign (who gets which writer), client (one shard), manifest,
build (all shards), dataset (a shard for PyTorch).
"""
