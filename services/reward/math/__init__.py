"""Mathematical answers: `extract` finds them, `parse` takes them apart, `compare` decides, with `algebra` where needed.

Nothing here but `algebra` imports a computer algebra system.
"""
