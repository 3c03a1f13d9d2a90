"""The links that come with the library; see `fedjax_peft.link` for the noun."""

from fedjax_peft.links.clipping import clip
from fedjax_peft.links.quantizing import fixed_point, int8
from fedjax_peft.links.weighing import Weighed, weigh

__all__ = ["Weighed", "clip", "fixed_point", "int8", "weigh"]
