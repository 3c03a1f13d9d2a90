"""The links that come with the library; see `fedjax_peft.link` for the noun."""

from fedjax_peft.links.affine import affine
from fedjax_peft.links.air import air
from fedjax_peft.links.clipping import clip
from fedjax_peft.links.discounting import discount, staleness_weight
from fedjax_peft.links.factoring import lowrank
from fedjax_peft.links.feedback import error_feedback
from fedjax_peft.links.masking import mask
from fedjax_peft.links.quantizing import (
  fixed_point,
  int4,
  int8,
  quantize,
  sign,
)
from fedjax_peft.links.restricting import only
from fedjax_peft.links.rotating import rotate
from fedjax_peft.links.sparsifying import rand_k, top_k
from fedjax_peft.links.weighing import Counted, Weighed, count, weigh

__all__ = [
  "Counted",
  "Weighed",
  "affine",
  "air",
  "clip",
  "count",
  "discount",
  "error_feedback",
  "fixed_point",
  "int4",
  "int8",
  "lowrank",
  "mask",
  "only",
  "quantize",
  "rand_k",
  "rotate",
  "sign",
  "staleness_weight",
  "top_k",
  "weigh",
]
