"""What watches a run, beside what trains it."""
