"""One planner per file: pure functions on arrays."""
