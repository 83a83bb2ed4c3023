"""Shards: the samples of each client in a folder of its own, and the manifest over all of them."""
