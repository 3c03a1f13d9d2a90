"""The links that come with the library; see `fedjax_peft.link` for the noun."""

from fedjax_peft.links.adaptive import adaptive_clip
from fedjax_peft.links.affine import affine
from fedjax_peft.links.air import air
from fedjax_peft.links.averaging import average
from fedjax_peft.links.clipping import clip
from fedjax_peft.links.discounting import discount, staleness_weight
from fedjax_peft.links.factoring import lowrank
from fedjax_peft.links.feedback import error_feedback
from fedjax_peft.links.intrinsic import clip_product
from fedjax_peft.links.masking import mask
from fedjax_peft.links.noising import local_noise, noise
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
  "adaptive_clip",
  "affine",
  "air",
  "average",
  "clip",
  "clip_product",
  "count",
  "discount",
  "error_feedback",
  "fixed_point",
  "int4",
  "int8",
  "local_noise",
  "lowrank",
  "mask",
  "noise",
  "only",
  "quantize",
  "rand_k",
  "rotate",
  "sign",
  "staleness_weight",
  "top_k",
  "weigh",
]
