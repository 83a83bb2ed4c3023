"""The tests; the processes that run them and those they start compute with one thread each.

The models here are so small that a second thread takes several times as much CPU time, to wait for the first.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
