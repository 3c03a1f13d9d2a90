"""Attacks: clients that misbehave inside the cohort.

An attack wraps a `Work`: those whose trait `attacker` is 1 misbehave, the
others do bit for bit what they did, and both are in one compiled program.
Attacks compose: `scale(label_flip(job, 10), 5.0)`.

  people = attack.attackers(data, 0.2, seed=0)
  job = attack.sign_flip(fp.train(model, local), 5.0)
  cloud = fp.tier("cloud", reduce=robust.median())
  algorithm = fp.federated(job, [cloud])

| attack | of what | source |
| --- | --- | --- |
| `label_flip` | examples | Tolpegin et al., 2020, arXiv 2007.08432 |
| `backdoor_image`, `backdoor_text` | examples | Gu et al., arXiv 1708.06733 |
| `sign_flip`, `scale` | message | Li et al., 2019, arXiv 1811.03761 |
| `gaussian` | message | Blanchard et al., 2017, arXiv 1703.02757 |
| `replace` | message | Bagdasaryan et al., 2020, arXiv 1807.00459 |

`on_examples` and `on_message` make new ones. What an attacker reports of its
training (`train/loss`) is of the examples as it saw them.
"""

from fedjax_peft.attack.crowd import attackers
from fedjax_peft.attack.message import gaussian, replace, scale, sign_flip
from fedjax_peft.attack.poison import (
  backdoor,
  backdoor_image,
  backdoor_text,
  label_flip,
)
from fedjax_peft.attack.success import backdoor_rate, triggered
from fedjax_peft.attack.trigger import Trigger, patch, phrase
from fedjax_peft.attack.wrap import on_examples, on_message

__all__ = [
  "Trigger",
  "attackers",
  "backdoor",
  "backdoor_image",
  "backdoor_rate",
  "backdoor_text",
  "gaussian",
  "label_flip",
  "on_examples",
  "on_message",
  "patch",
  "phrase",
  "replace",
  "scale",
  "sign_flip",
  "triggered",
]
