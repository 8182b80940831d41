"""The reward service as the reward function of other training pipelines."""
