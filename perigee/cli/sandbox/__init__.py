"""`perigee sandbox`: run programs, judge solutions, make test cases, serve."""
