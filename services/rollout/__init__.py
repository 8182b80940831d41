"""The rollout service: generates trajectories with one policy version at a time."""
