"""Collections in the layout of BEIR, and its metrics."""
