"""Who reads a checkpoint, by its config: no more than the documentation says."""

import pytest
from compressed_tensors.quantization import preset_name_to_scheme

from bitpress.checkpoints.served import readers, vllm_knows
from bitpress.quantization import stored_format

SERVED = {
    "W4A16": True, "W4A16_ASYM": True, "W8A16": True, "W3A16": True, "W8A8": True, "FP8": True, "FP8_DYNAMIC": True,
    "FP8_BLOCK": True, "NVFP4": True, "NVFP4A16": True, "MXFP4A16": True, "MXFP6A16": False, "W4A8": True,
}  # fmt: skip


def config(name, architecture="LlamaForCausalLM", **changed):
    try:
        scheme = preset_name_to_scheme(name, ["Linear"])
    except KeyError:
        pytest.skip(f"this compressed-tensors has no {name}")
    scheme = scheme.model_copy(update={"format": stored_format(scheme)})
    dumped = {**scheme.model_dump(mode="json"), **changed}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": dumped}}
    return {"architectures": [architecture], "quantization_config": quantization}


def code(found):
    return "\n".join(code for _, code, _ in found.lines)


@pytest.mark.parametrize("name", list(SERVED))
def test_presets(name):
    found = readers(config(name))
    assert ("vllm serve" in code(found)) is SERVED[name]
    assert ("torch.bfloat16" in code(found)) is ("FP4" in name or name.startswith("MXFP"))
    assert "bitpress.load" in code(found)


def test_what_does_not_generate_is_not_served():
    assert "vllm" not in code(readers(config("W4A16", "BertForMaskedLM")))
    assert "BertForMaskedLM.from_pretrained" in code(readers(config("W4A16", "BertForMaskedLM")))


def test_integers_one_a_byte_are_not_packed():
    assert not vllm_knows(config("W4A16", format="int-quantized")["quantization_config"]["config_groups"]["group_0"])


def test_what_transformers_cannot_load():
    found = readers(config("W4A16"), by_transformers=False)
    assert "from transformers" not in code(found)
    assert found.notes == ("transformers does not load this model packed.",)
    found = readers(config("W4A16"), known=False, by_transformers=False)
    assert ("bitpress.load" in code(found), found.library) == (False, None)


def test_other_formats():
    assert code(readers({}, gguf=True)) == "llama-cli -m model.gguf"
    awq = readers({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "awq"}})
    assert (awq.format, awq.packed) == ("awq", False)
    assert "vllm serve" in code(awq)
    dense = readers({"architectures": ["LlamaForCausalLM"]})
    assert (dense.format, "vllm" in code(dense), "compressed-tensors" in dense.lines[0][0]) == ("", False, False)
