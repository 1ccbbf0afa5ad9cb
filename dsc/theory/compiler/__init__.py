"""The compiler: an unrolled layer as a network of standard parts, exact or with the bound of its error."""

from dsc.theory.compiler.compiled import Compiled, compile

__all__ = ["Compiled", "compile"]
