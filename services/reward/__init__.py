"""The reward service: verdicts on responses, where a failure to judge is never a reward."""
