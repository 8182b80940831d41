"""Clients of Perigee's services: generated stubs, typed async clients and errors."""

__version__ = "0.2.0"
