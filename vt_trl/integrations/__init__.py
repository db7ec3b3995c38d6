"""Other people's evaluation suites on our rollout loop. Nothing here is imported unless such a suite asks for it."""
