"""The server's side of a run: who takes part, what a run leaves on disk, and the grids that carry messages.

server_app.py builds on all of it. Clients import nothing from here.
"""

import logging

LOGGER = logging.getLogger("flwr")  # importing Flower for its `log` takes 0.3 s, in commands, too
