"""Fleet around a model that does not know of it: mesh, collectives, tensor, expert, sharding and
data parallelism, and what Fleet lacks on a CPU.

Traps of Fleet (paddle 3.3), by the letters that code and tests name them with:
b  sharding V2 without main_grad loses the view of a cleared gradient: nothing moves after step 1
c  sharding V2 beside data parallelism filters parameters before its slices exist: replicas diverge
d  a weight tied across the pipeline is counted by both stages, their names being compared wrongly
g  sharding V1 with Fleet's experts: an owner's broadcast overwrites those of other expert ranks
h  Fleet's clipping counts experts on every rank that has tokens for them
i  gradients of Fleet's experts must be scaled by tensor / expert
m  gradients of whole parameters under sequence parallelism are partial sums on each tensor rank
n  so is that of LoRA's whole A in a column layer without it
o  and that of the whole factor of either kind of layer with it
p  recompute returns a detached output where its input needs no gradient: that block never trains,
   and a pipeline waits for ever
q  shapes at stage boundaries are sent once and kept, though micro-batches differ in length
r  boundary tensors are taken for equal on the tensor ranks, which sequence parallelism makes untrue
s  virtual stages want more than two stages, and as many micro-batches, or twice as many
t  a pipeline's loss is the mean over micro-batches of their means, not of all tokens
u  boundary tensors must need gradients, and all stages count the same micro-batches, or they wait
   for each other for ever
w  what every stage holds beside its layers (the tower) is counted by each of them
"""
