"""What the numbers mean: theory of superposition, and counts of the features of a layer."""
