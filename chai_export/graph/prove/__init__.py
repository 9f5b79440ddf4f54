"""Run parts of a graph, or all of it, and compare: nothing is believed for its shape."""
