"""Which data a run was trained on, and whether others are the same."""
