"""A compressed weight as numbers: a sum of parts, each of which knows its values and counts its bits."""
