"""What training puts around a network.

    recompute  blocks that keep less for the backward pass, fold beta into w, and compute no token that no head reads

The network itself stays as a paper writes it: `lape_ray.model` knows nothing of this room.
"""
