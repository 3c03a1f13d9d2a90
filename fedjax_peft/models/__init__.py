"""A small zoo of models; any NNX module works in their place."""

from fedjax_peft.models.cnn import CNN, CNNConfig
from fedjax_peft.models.decoder import Decoder, DecoderConfig
from fedjax_peft.models.encoder import Encoder, EncoderConfig
from fedjax_peft.models.pretrained import load, names, prepare, tokenizer
from fedjax_peft.models.vision import ViT, ViTConfig

__all__ = [
  "CNN",
  "CNNConfig",
  "Decoder",
  "DecoderConfig",
  "Encoder",
  "EncoderConfig",
  "ViT",
  "ViTConfig",
  "load",
  "names",
  "prepare",
  "tokenizer",
]
