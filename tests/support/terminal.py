"""A file that says that it is a terminal."""

import io


class Terminal(io.StringIO):
    """What bars and questions take for a terminal."""

    def isatty(self) -> bool:
        return True
