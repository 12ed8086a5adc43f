"""Figures and pages for people: position as attention sees it, its robustness, and the outcome of a run.

build          the steps behind jobs/position_report.py
figures        figures, by matplotlib without a display
goodput        the wall time of a run, divided
outcome        the outcome of a finished run, in numbers
page           one HTML page that needs nothing else
position       the position embedding as attention sees it, in numbers
position_page  the page of position embeddings
progress       the change of position maps while a network trains
robustness     accuracy at other resolutions and under shifts
statistics     `Estimate`: a mean and its interval
summary        the page of a finished run
"""
