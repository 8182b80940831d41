"""Service framework: configuration, server, HTTP gateway, telemetry, child processes, model folders."""
