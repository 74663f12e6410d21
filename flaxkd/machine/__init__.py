"""The machine that runs it: mesh and sharding, several hosts, what speeds up a CPU, files, flags and errors."""
