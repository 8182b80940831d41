"""The command line `perigee`: local stack, training runs with a live view, status, reports."""
