"""Deep sparse coding for PyTorch: a dictionary, a prox and a solver make a layer; layers make the model zoo."""

from importlib.metadata import version

from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.models import create_model, list_models, load
from dsc.observe import Observer
from dsc.prox import activation_factory, create_activation, list_activations
from dsc.solvers import FISTA, ISTA

__version__ = version("deep-sparse-coding")
__all__ = [
    "FISTA",
    "ISTA",
    "ConvDictionary",
    "DeepSparseCoding",
    "DenseDictionary",
    "Observer",
    "SparseCoding",
    "activation_factory",
    "create_activation",
    "create_model",
    "list_activations",
    "list_models",
    "load",
]
