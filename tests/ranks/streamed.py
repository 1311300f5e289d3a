"""A rank of test_streamed.py: compresses a model that stays on the disk; told to, all ranks end at a block.

Told to end at "datafree", it rounds each weight by itself.
"""

import os
import signal
import sys

from compressing import token_ids

from bitpress import AWQModifier, GPTQModifier, Modifier, QuantizationModifier, oneshot
from bitpress.quantization import QuantizationArgs, QuantizationScheme


class Ending(Modifier):
    def on_solved(self, state, block):
        if block.name == END_AT:
            state.ranks.gather()
            os.kill(os.getpid(), signal.SIGKILL)


MODEL, OUT, END_AT = sys.argv[1:]
WEIGHTS = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=16)
GROUPS = {"all": QuantizationScheme(targets=["Linear"], weights=WEIGHTS)}
RECIPE = [AWQModifier(), GPTQModifier(config_groups=GROUPS, ignore=["lm_head"]), Ending()]
if END_AT == "datafree":
    oneshot(MODEL, None, QuantizationModifier(config_groups=GROUPS), output_dir=OUT, stream=True, progress=False)
else:
    oneshot(MODEL, token_ids(6), RECIPE, output_dir=OUT, stream=True, progress=False)
