"""Find attention in a graph: one matcher for each way in which exporters write it."""
