"""Flower strategies: who is asked in a round, which replies count, and how they are combined."""
