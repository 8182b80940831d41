"""`perigee reward`: commands of the reward service that need no running stack."""
