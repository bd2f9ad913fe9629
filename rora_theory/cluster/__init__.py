"""Cells of an experiment on Ray: several at a time on this machine, or on the nodes of a cluster.

The process that calls is Ray's driver and owns the run folder (`driver`). Ray places every cell on a node that has the
CPUs, GPUs and memory it takes, does it again on another when its node dies, and brings its result and files back. What
the cells share, such as records and settings, is put into Ray's object store once. A base model is read where a worker
has it, by its path or from the hub; one that workers lack is put into the store too, once (`models`). So workers need
no folder of the driver's. One that sees the run folder all the same works in the cell's own folder, as a single process
does, and goes on from its checkpoints (`worker`).
"""

from rora_theory.cluster.config import ClusterConfig
from rora_theory.cluster.connection import leave

__all__ = ["ClusterConfig", "leave"]
