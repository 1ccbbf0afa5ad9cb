"""Deep sparse coding for PyTorch: a dictionary, a prox and a solver make a layer; layers make the model zoo."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dsc.activations import activation_factory, create_activation, list_activations
from dsc.catalogue import ModelInfo, describe_model, describe_models
from dsc.dictionaries import ConvDictionary, DenseDictionary
from dsc.encode import sparse_encode
from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.learned import ALISTA, LISTA, LISTACP, SupportSelection, analytic_weights
from dsc.models import create_model, list_models, load
from dsc.observe import Observer
from dsc.solvers import FISTA, ISTA, ConvergenceWarning

if TYPE_CHECKING:
    from dsc.dictionary_learning import DictionaryLearning

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


def __getattr__(name: str) -> Any:
    # scikit-learn, which the estimator alone needs, would add a fifth to the time of every import.
    if name == "DictionaryLearning":
        from dsc.dictionary_learning import DictionaryLearning

        return DictionaryLearning
    raise AttributeError(f"module 'dsc' has no attribute {name!r}")
