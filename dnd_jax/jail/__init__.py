"""Generated code in a process that can reach nothing. Standard library only: it runs without site-packages."""
