"""Typed YAML, and the assignment of its steps to the weights of a model."""
