"""Model families as data: blocks, taps, experts, channels; which tensor is compressed, copied or dropped."""
