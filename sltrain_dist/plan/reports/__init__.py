"""Reports of what the planner found: text, JSON, an HTML page and a plot."""
