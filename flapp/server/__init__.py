"""The server's side of a run: who takes part, what a run leaves on disk, and the grids that carry messages.

server_app.py builds on all of it. Clients import nothing from here.
"""
