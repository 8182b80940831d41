"""Interfaces of other sandboxes, for clients that speak them already."""
