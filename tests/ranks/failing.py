"""A rank of test_joining.py, where one dies while the second block is solved. The last line is JSON."""

import json
import os
import signal
import sys

import tiny
from compressing import scheme, token_ids

from bitpress import AWQModifier, BitpressError, QuantizationModifier, oneshot

HOW, WHO = sys.argv[1], (sys.argv[2:] or ["1"])[0]


class Dying(QuantizationModifier):
    def on_block(self, state, block):
        if os.environ["RANK"] == WHO and block.name.endswith("1"):
            if HOW == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if HOW == "exit":
                sys.exit(3)
            raise ValueError("no such luck")
        super().on_block(state, block)


def main():
    model = tiny.llama()
    before = tiny.snapshot(model)
    try:
        recipe = [AWQModifier(), Dying(ignore=["lm_head"], config_groups={"g": scheme()})]
        oneshot(model, token_ids(5), recipe, num_calibration_samples=5)
    except BitpressError as error:
        tiny.assert_unchanged(model, before)
        said = {"error": type(error).__name__, "message": str(error), "model as it was": True}
        sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
