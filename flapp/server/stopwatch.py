"""Where the time of a round goes on the server."""

import time

PHASES = ("configure", "send", "train", "aggregate", "evaluate", "central", "save")


class Stopwatch:
    """Divide a round's wall time into phases, of which one is always running."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a round with its first phase."""
        self.phase = PHASES[0]
        self.phases = dict.fromkeys(PHASES, 0.0)
        self._began = self._entered = time.monotonic()

    def enter(self, phase: str) -> None:
        """End the running phase and begin another."""
        now = time.monotonic()
        self.phases[self.phase] += now - self._entered
        self.phase, self._entered = phase, now

    def enter_after(self, running: str, phase: str) -> None:
        """Begin a phase if `running` is the one that runs."""
        if self.phase == running:
            self.enter(phase)

    def end(self) -> tuple[float, dict[str, float]]:
        """End the round and return its seconds and those of each phase; the next one begins at this moment."""
        self.enter(PHASES[0])
        seconds, phases = self._entered - self._began, {name: round(t, 6) for name, t in self.phases.items()}
        self.start()
        return round(seconds, 6), phases
