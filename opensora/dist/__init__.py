"""Work shared by ranks: the mesh, differentiable collectives, sequence parallelism."""
