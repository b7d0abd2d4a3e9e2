"""Context parallelism: token layouts and schedules (pure functions), transport, and the differentiable attention over ranks."""
