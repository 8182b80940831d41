"""The report of a run: one HTML page with all it needs inside, made from the records in the run's folder."""
