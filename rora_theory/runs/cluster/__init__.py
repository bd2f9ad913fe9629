"""Run the cells of an experiment with Ray: several at a time on this machine, or on the nodes of a cluster.

The calling process is Ray's driver and owns the run folder (`driver`). Ray places each cell on a node with the CPUs,
GPUs and memory that it needs, retries it on another node if its node dies, and returns its result and files. Data that
the cells share, such as records and settings, is put into Ray's object store once. A worker reads a base model by its
path or from the hub. A model that a worker does not have is also put into the object store once (`models`), so workers
need no access to the driver's folders. A worker that can access the run folder works in the cell's folder, as a single
process does, and resumes from its checkpoints (`worker`).
"""

from rora_theory.runs.cluster.config import ClusterConfig
from rora_theory.runs.cluster.connection import leave

__all__ = ["ClusterConfig", "leave"]
