"""From a budget to a recipe: candidates, sensitivity, planners, feasibility, sweeps."""
