"""Reports of the planner's results: text, JSON, an HTML page and a plot."""
