"""Command lines and files of the systems that minillama replaces, read as its own."""
