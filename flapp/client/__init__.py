"""The client's side of a run: its data, what it keeps between rounds, and the mods around its handlers.

client_app.py builds on all of it. The server imports nothing from here.
"""
