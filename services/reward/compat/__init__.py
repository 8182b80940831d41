"""Endpoints that other pipelines call as they are."""
