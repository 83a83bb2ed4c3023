"""The page that tools.report writes.

reading.py reads a run into the class of run.py. charts.py and drawing.py draw figures. sections.py and several.py write
the text. markup.py makes HTML.
"""
