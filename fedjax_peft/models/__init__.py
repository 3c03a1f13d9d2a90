"""A small zoo of text models; any NNX module works in their place."""

from fedjax_peft.models.decoder import Decoder, DecoderConfig
from fedjax_peft.models.encoder import Encoder, EncoderConfig
from fedjax_peft.models.pretrained import load, names, prepare, tokenizer

__all__ = [
  "Decoder",
  "DecoderConfig",
  "Encoder",
  "EncoderConfig",
  "load",
  "names",
  "prepare",
  "tokenizer",
]
