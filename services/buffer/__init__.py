"""The replay buffer: groups, trajectories, verdicts, statistics and run state, kept in Redis."""
