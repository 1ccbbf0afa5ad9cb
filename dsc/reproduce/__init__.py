"""Experiments that anyone can run: `dsc reproduce <name>`, one file each."""

from dsc.reproduce import (
    dsc_compiler,
    dsc_rate,
    dsc_theory,
    gsae_clustering,
    gsae_mnist,
    gsae_recovery,
    gsae_subspaces,
    lista,
    sparse_training,
)
from dsc.reproduce.results import Experiment

_MODULES = (
    dsc_compiler,
    dsc_rate,
    dsc_theory,
    gsae_clustering,
    gsae_mnist,
    gsae_recovery,
    gsae_subspaces,
    lista,
    sparse_training,
)
EXPERIMENTS: dict[str, Experiment] = {module.__name__.rpartition(".")[2]: Experiment.of(module) for module in _MODULES}
