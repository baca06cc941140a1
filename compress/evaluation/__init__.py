"""How good and how fast: quality, tasks, intervals, speed, bisection."""
