"""Train a network: the loop and what it needs. Nothing here knows Ray, a tracker or a cluster.

loop           `train`: epochs, evaluation and checkpoints
step           an optimizer step, from the loader's images to new weights
rehearsal      a step that nobody keeps, on a worker that stands by
state          `build_state`: network, optimizer, loaders and the process group of a worker
distributed    this process among the workers of a run
cuda_graph     an optimizer step as one CUDA graph
parallelize    compilation and data parallelism, put around the network
head_only      the backbone without a gradient, for a linear probe
statistics     running statistics of batch norms, equal on all workers
recompute      blocks that keep less for the backward pass, fold beta into w, and compute no token that no head reads
optim          parameter groups, the learning rate, the weights' moving average
muon           Muon, for the matrices of the blocks
lamb           LAMB, the optimizer of DeiT III
loss           the losses with soft targets, and distillation from a teacher
metrics        exact counts of an evaluation, speed and waiting
times          the time of a training process, divided
checkpoint     the checkpoint of a run, written and read, and weights of any origin, read
host_copies    copies of the state to host memory, made while the training goes on
weight_files   files of other code, opened without running anything, down to the state dict
classes        classes of data and of a checkpoint, matched by name
preprocessing  what weights of other code say of their images
architecture   what network they are of, where timm's config.json says it
initial        the weights that a run starts from
inputs         sha256 of the files that a run learns from
flags          the flags that the ranks of a run exchange at every step
preflight      checks before any worker starts
"""
