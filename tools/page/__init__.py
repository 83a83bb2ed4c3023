"""The page that tools.report writes: run.py (what a run says) and reading.py; drawing.py and charts.py; markup.py and
sections.py."""
