"""Comparison of mathematical answers: finding the answer, normalising it, taking it apart, comparing its parts.

Nothing here but `algebra` imports a computer algebra system.
"""
