"""Work on files: one of them, many in processes, many on a cluster."""
