"""The chassis that every service stands on: configuration, server, interceptors, telemetry."""
