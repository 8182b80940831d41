"""Merging model folders of one shape: `perigee merge`."""
