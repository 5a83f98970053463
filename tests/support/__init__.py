"""What several test folders share: tiny rows and runs, ranks that are threads, trajectories of
every method. Knows no test.
"""
