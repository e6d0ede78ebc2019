"""Tasks: what a worker does beside the units of jobs. The supervisor takes them one by one; each runs in a process of its own."""
