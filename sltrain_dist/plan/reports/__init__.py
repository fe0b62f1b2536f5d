"""What the planner found, for people and programs to read."""
