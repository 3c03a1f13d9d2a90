"""What other libraries read: adapters and models in Hugging Face layouts.

| method | encoder | decoder | vision transformer |
| --- | --- | --- | --- |
| lora, dora, ia3 | yes | yes | yes |
| prompt | without their head | yes, but no Gemma | no |
| prefix | no | yes | no |
| head, pooler, norms beside one of these | yes | yes | yes |

Where the layout can hold the numbers but the other library would compute
something else with them, nothing is written.
"""

from fedjax_peft.interop.reading import import_adapter
from fedjax_peft.interop.whole import export_merged
from fedjax_peft.interop.writing import export_adapter

__all__ = ["export_adapter", "export_merged", "import_adapter"]
