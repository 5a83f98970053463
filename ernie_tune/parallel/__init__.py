"""Fleet around a model that does not know of it: mesh, collectives, tensor, expert, sharding and
data parallelism, and what Fleet lacks on a CPU.
"""
