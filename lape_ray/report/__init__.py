"""Figures and pages that people read: what position looks like to attention, how robust it is, what a run came to.

build          the steps behind jobs/position_report.py
figures        figures, by matplotlib without a display
outcome        what a finished run comes to, in numbers
page           one HTML page that needs nothing else
position       what position looks like to attention, in numbers
position_page  the page of position embeddings
progress       how position maps change while a network trains
robustness     accuracy at other resolutions and under shifts
statistics     `Estimate`: a mean and its interval
summary        the page of a finished run
"""
