"""One block at a time: hidden states, the walk, a block as a method sees it, compression of its sites."""
