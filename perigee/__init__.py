"""Clients of Perigee's services: generated stubs, typed async clients and errors."""
