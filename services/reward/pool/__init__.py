"""Checks in processes that may be killed."""
