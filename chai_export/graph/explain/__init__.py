"""Say what was found, what stands in the way and what a rewrite would take."""
