"""`perigee reward`: responses scored from files, and value heads trained."""
