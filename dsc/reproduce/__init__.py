"""Experiments that anyone can run: `dsc reproduce <name>`, one file each."""

from dsc.reproduce import lista
from dsc.reproduce.results import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "lista": Experiment(lista.__doc__ or "", lista.add_arguments, lista.run),
}
