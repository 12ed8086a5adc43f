"""Figures and pages that people read: what position looks like to attention, how robust it is, what a run came to."""
