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

EXPERIMENTS: dict[str, Experiment] = {
    "dsc_compiler": Experiment(dsc_compiler.__doc__ or "", dsc_compiler.add_arguments, dsc_compiler.run),
    "dsc_rate": Experiment(dsc_rate.__doc__ or "", dsc_rate.add_arguments, dsc_rate.run),
    "dsc_theory": Experiment(dsc_theory.__doc__ or "", dsc_theory.add_arguments, dsc_theory.run),
    "gsae_clustering": Experiment(gsae_clustering.__doc__ or "", gsae_clustering.add_arguments, gsae_clustering.run),
    "gsae_mnist": Experiment(gsae_mnist.__doc__ or "", gsae_mnist.add_arguments, gsae_mnist.run),
    "gsae_recovery": Experiment(gsae_recovery.__doc__ or "", gsae_recovery.add_arguments, gsae_recovery.run),
    "gsae_subspaces": Experiment(gsae_subspaces.__doc__ or "", gsae_subspaces.add_arguments, gsae_subspaces.run),
    "lista": Experiment(lista.__doc__ or "", lista.add_arguments, lista.run),
    "sparse_training": Experiment(sparse_training.__doc__ or "", sparse_training.add_arguments, sparse_training.run),
}
