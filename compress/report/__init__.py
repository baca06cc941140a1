"""Rows, summary, card, HTML page, comparison, and what may be said of this machine."""
