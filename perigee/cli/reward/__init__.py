"""`perigee reward`: responses scored from files."""
