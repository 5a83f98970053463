"""The command line: one small file a verb. Imports the packages below it only inside the verb that
runs, and never paddle at the top.
"""
