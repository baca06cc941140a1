"""One codec per kind of part: part <-> named tensors."""
