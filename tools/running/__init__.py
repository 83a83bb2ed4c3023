"""What `tools.run` is made of: progress, sweeps, the inline runtime, resuming and stopping."""
