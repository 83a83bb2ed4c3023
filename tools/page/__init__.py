"""The page that tools.report writes: reading.py reads a run (run.py), charts.py and drawing.py draw its figures,
sections.py and several.py say the rest, in the HTML of markup.py."""
