"""The data doctor: what is wrong with rows, by file and line, and mended where that is safe."""
