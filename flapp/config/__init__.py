"""Settings: their names, types and ranges (schema), which values go together (rules), and reading conf/ (load).

Only load knows Hydra. Everything else in flapp takes a `Config` of schema.py, which is read-only.
"""
