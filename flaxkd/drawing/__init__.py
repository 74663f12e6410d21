"""Pictures: the Python API (pipeline), the one loop that draws (batches), resumable folders, grids and charts."""
