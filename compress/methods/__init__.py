"""What a method author needs and nothing else: the contract, solvers, and one file per method."""
