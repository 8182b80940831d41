"""The checkpoint engine: shards in shared memory, pushed by the trainer, verified and committed in rollout workers."""
