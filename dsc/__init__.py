"""Deep sparse coding for PyTorch: a dictionary, a prox and a solver make a layer; layers make the model zoo."""

from importlib.metadata import version

from dsc.activations import activation_factory, create_activation, list_activations
from dsc.catalogue import ModelInfo, describe_model, describe_models
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.dictionary_learning import DictionaryLearning
from dsc.encode import sparse_encode
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.learned import ALISTA, LISTA, LISTACP, SupportSelection, analytic_weights
from dsc.models import create_model, list_models, load
from dsc.observe import Observer
from dsc.solvers import FISTA, ISTA, ConvergenceWarning

__version__ = version("deep-sparse-coding")
__all__ = [
    "ALISTA",
    "FISTA",
    "ISTA",
    "LISTA",
    "LISTACP",
    "ConvDictionary",
    "ConvergenceWarning",
    "DeepSparseCoding",
    "DenseDictionary",
    "DictionaryLearning",
    "ModelInfo",
    "Observer",
    "SparseCoding",
    "SupportSelection",
    "activation_factory",
    "analytic_weights",
    "create_activation",
    "create_model",
    "describe_model",
    "describe_models",
    "list_activations",
    "list_models",
    "load",
    "sparse_encode",
]
