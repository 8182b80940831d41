"""Prints nothing and ends well."""
