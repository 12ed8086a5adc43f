"""Train a network: the loop and what it needs. Nothing here knows Ray, a tracker or a cluster.

loop         `train`: epochs, evaluation and checkpoints
step         an optimizer step, from the loader's images to new weights
state        `build_state`: network, optimizer, loaders and the process group of a worker
cuda_graph   an optimizer step as one CUDA graph
parallelize  compilation and data parallelism, put around the network
recompute    blocks that keep less for the backward pass, fold beta into w, and compute no token that no head reads
optim        parameter groups, the learning rate, the weights' moving average
muon         Muon, for the matrices of the blocks
loss         the loss with soft targets, and distillation from a teacher
metrics      exact counts of an evaluation, speed and waiting
checkpoint   what is saved of a run, and how weights of any origin are read
flags        what the ranks of a run tell each other at every step
preflight    what is checked before any worker starts
"""
