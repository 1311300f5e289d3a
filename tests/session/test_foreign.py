"""llm-compressor's recipes in YAML, as they are: what is the same loads, what is not is refused or warned of."""

import logging

import pytest
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from compressing import scheme

from bitpress import AWQMapping, AWQModifier, BitpressError, GPTQModifier, QuantizationModifier, Recipe
from bitpress import SmoothQuantModifier as SmoothQuant
from bitpress.modifiers.foreign import ABSENT
from bitpress.quantization import QuantizationScheme
from bitpress.session.foreign import ARGUMENTS, take_arguments

W8A8_STATIC = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=8, symmetric=True, strategy="channel"),
    input_activations=QuantizationArgs(
        num_bits=8, symmetric=False, dynamic=False, strategy="tensor", observer="static_minmax"
    ),
)
# What its recipes in YAML say, and the same as objects.
SAME = {
    "a preset": (
        """
        quant_stage:
          quant_modifiers:
            QuantizationModifier:
              targets: Linear
              scheme: FP8_DYNAMIC
              ignore: [lm_head, "re:.*mlp.gate$"]
        """,
        [QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC", ignore=["lm_head", "re:.*mlp.gate$"])],
    ),
    "presets with their targets": (
        "DEFAULT_stage: {DEFAULT_modifiers: {GPTQModifier: {scheme: {W4A16: ['re:.*mlp.*'], W8A16: Linear}}}}",
        [GPTQModifier(scheme={"W4A16": ["re:.*mlp.*"], "W8A16": ["Linear"]})],
    ),
    "smoothing with the balance layers first": (
        """
        test_stage:
          obcq_modifiers:
            SmoothQuantModifier:
              smoothing_strength: 0.8
              mappings: [
                [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
                [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"]
              ]
              ignore: null
            GPTQModifier:
              sequential_update: true
              ignore: [lm_head]
              actorder: null
              config_groups:
                group_0:
                  weights: {num_bits: 8, type: int, symmetric: true, strategy: channel, actorder: False}
                  input_activations:
                    {num_bits: 8, symmetric: false, dynamic: false, strategy: tensor, observer: static_minmax}
                  targets: [Linear]
        """,
        [
            SmoothQuant(
                smoothing_strength=0.8,
                ignore=[],
                mappings=[
                    AWQMapping("re:.*input_layernorm", ["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"]),
                    AWQMapping("re:.*post_attention_layernorm", ["re:.*gate_proj", "re:.*up_proj"]),
                ],
            ),
            GPTQModifier(ignore=["lm_head"], actorder=None, config_groups={"group_0": W8A8_STATIC}),
        ],
    ),
    "modifiers with targets of their own": (
        """
        quant_stage:
          quant_modifiers:
            AWQModifier:
              duo_scaling: true
              mappings:
                - smooth_layer: "re:.*input_layernorm$"
                  balance_layers: ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]
                  activation_hook_target: null
            QuantizationModifier:
              scheme: W4A16
              targets: ["re:.*self_attn\\\\.(k|q|o|v)_proj$"]
            GPTQModifier:
              scheme: W8A8
              targets: ["re:.*mlp\\\\.(down|gate|up)_proj$"]
              block_size: 128
              dampening_frac: 0.001
              actorder: weight
        """,
        [
            AWQModifier(
                duo_scaling=True,
                mappings=[AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"])],
            ),
            QuantizationModifier(scheme="W4A16", targets=[r"re:.*self_attn\.(k|q|o|v)_proj$"]),
            GPTQModifier(
                scheme="W8A8",
                targets=[r"re:.*mlp\.(down|gate|up)_proj$"],
                block_size=128,
                dampening_frac=0.001,
                actorder="static",
            ),
        ],
    ),
    "modifiers as a list, stages that were merged": (
        """
        run_type: oneshot
        a_stage_0:
          run_type: oneshot
          a_modifiers:
            - AWQModifier: {bits: 4}
        a_stage_1:
          b_modifiers_0:
            - QuantizationModifier: {scheme: W4A16, group: b, index: null, start: -1, end: -1}
        """,
        [AWQModifier(bits=4), QuantizationModifier(scheme="W4A16")],
    ),
    "a cache, in JSON": (
        '{"quant_stage": {"quant_modifiers": {"QuantizationModifier": {"kv_cache_scheme": {"num_bits": 8, '
        '"type": "float", "strategy": "tensor", "dynamic": false, "symmetric": true}}}}}',
        [
            QuantizationModifier(
                kv_cache_scheme=QuantizationArgs(
                    num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True
                )
            )
        ],
    ),
    "observers": (
        """
        quant_stage:
          quant_modifiers:
            QuantizationModifier:
              scheme: NVFP4
              observer: {weights: mse, input: static_minmax}
              bypass_divisibility_checks: false
              requires_calibration_data: true
        """,
        [QuantizationModifier(scheme="NVFP4", weight_observer="mse")],
    ),
}


def plain(text):
    """The text without the indentation of this file."""
    lines = text.splitlines()
    width = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[width:] for line in lines)


@pytest.mark.parametrize("case", SAME)
def test_what_is_the_same_loads_without_a_word(case, caplog):
    text, expected = SAME[case]
    with caplog.at_level(logging.INFO):
        assert Recipe.of(plain(text)) == Recipe.of(expected)
    assert not caplog.records


# What it writes beside a checkpoint: every field, with the defaults.
WRITTEN = """
default_stage:
  default_modifiers:
    AWQModifier:
      requires_calibration_data: true
      mappings:
      - smooth_layer: re:.*v_proj$
        balance_layers: ['re:.*o_proj$']
        activation_hook_target: null
      offload_device: !!python/object/apply:torch.device
      - cpu
      duo_scaling: both
      n_grid: 20
    GPTQModifier:
      config_groups:
        group_0:
          targets: [Linear]
          weights:
            num_bits: 4
            type: int
            symmetric: false
            group_size: 32
            strategy: group
            block_structure: null
            dynamic: false
            actorder: null
            scale_dtype: null
            zp_dtype: torch.int8
            observer: memoryless_minmax
            observer_kwargs: {}
          input_activations: null
          output_activations: null
          format: null
      targets: [Linear]
      ignore: [lm_head]
      bypass_divisibility_checks: false
      requires_calibration_data: true
      block_size: 128
      dampening_frac: 0.01
      actorder: static
      batched_quantization: auto
"""


def test_what_it_saves_beside_a_checkpoint(caplog):
    awq, gptq = Recipe.of(WRITTEN).modifiers
    assert awq == AWQModifier(mappings=[AWQMapping("re:.*v_proj$", ["re:.*o_proj$"])], duo_scaling="both", n_grid=20)
    weights = gptq.groups()["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.actorder, weights.observer) == (
        4, 32, "static", "memoryless_minmax",
    )  # fmt: skip
    assert "AWQModifier: offload_device=" in caplog.text
    assert "oneshot(activations=...)" in caplog.text
    # An object of Python is named, never made; anywhere else it is refused.
    with pytest.raises(BitpressError, match="not YAML"):
        Recipe.of(WRITTEN.replace("n_grid: 20", "n_grid: !!python/object/apply:os.getcwd []"))


# Orders of columns.


def test_columns_are_ordered_by_activity_unless_something_else_is_stated():
    def order(stated=None, **fields):
        weights = scheme().weights.model_copy(update={"actorder": stated and ActivationOrdering(stated)})
        groups = {"g": QuantizationScheme(targets=["Linear"], weights=weights)}
        return GPTQModifier(config_groups=groups, **fields).groups()["g"].weights.actorder

    assert order() == "static"
    assert order(actorder="weight") == "static"
    assert order("weight", actorder="static") == "weight"
    assert order(actorder=None) is None
    with pytest.raises(BitpressError, match="actorder=None, but a scheme of it 'static'"):
        order("static", actorder=None)
    with pytest.raises(BitpressError, match=r"actorder: .*'group' makes servers look up"):
        order(actorder="group")
    chosen = GPTQModifier(choose_from=["W4A16", "W8A16"], bits_per_weight=5).groups().values()
    assert [s.weights.actorder for s in chosen] == ["static", "static"]


def test_one_observer_for_all_weights():
    stated = QuantizationModifier(
        config_groups={"a": scheme(), "b": QuantizationScheme(targets=["X"], input_activations=QuantizationArgs())},
        observer={"weights": "gram"},
    )
    assert stated.groups()["a"].weights.observer == "gram"
    assert stated.groups()["b"].weights is None
    assert AWQModifier(bits=4, weight_observer="mse").groups()["group_0"].weights.observer == "mse"
    with pytest.raises(BitpressError, match=r"weight_observer: .*no observer is called 'msee'.*'mse'"):
        QuantizationModifier(scheme="W4A16", weight_observer="msee")
    with pytest.raises(BitpressError, match="observer is a mapping of weights, input, output"):
        QuantizationModifier(scheme="W4A16", observer="mse")


# What cannot be done is an error with the way out; what has no meaning is a warning that says what there is.

REFUSED = {
    "bypass_divisibility_checks": ("GPTQModifier", "true", "choose one that does"),
    "input_observer": ("QuantizationModifier", "mse", "leave it out"),
    "end": ("AWQModifier", "3", "does not train"),
    "num_calibration_steps": ("SmoothQuantModifier", "8", "num_calibration_samples"),
    "algorithm": ("SmoothQuantModifier", "log_equalization", "smoothing_strength"),
}
WARNED = {
    "offload_device": ("AWQModifier", "cpu"),
    "batched_quantization": ("GPTQModifier", "4"),
    "sequential_update": ("GPTQModifier", "false"),
    "sequential_targets": ("GPTQModifier", "[LlamaDecoderLayer]"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_refused(field):
    modifier, value, way_out = REFUSED[field]
    with pytest.raises(BitpressError, match=rf"line 3: {modifier}: {field}=.* not supported: .*{way_out}"):
        Recipe.of(f"a_stage:\n  a_modifiers:\n    {modifier}: {{{field}: {value}}}\n")


@pytest.mark.parametrize("field", WARNED)
def test_what_is_warned_of(field, caplog):
    modifier, value = WARNED[field]
    recipe = Recipe.of(f"a_stage:\n  a_modifiers:\n    {modifier}: {{{field}: {value}}}\n")
    assert not recipe.modifiers[0].model_fields_set
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{modifier}: {field}=")


@pytest.mark.parametrize("name", ABSENT)
def test_modifiers_that_are_not_there(name):
    with pytest.raises(BitpressError, match=rf"line 3: llm-compressor's {name} is not there: "):
        Recipe.of(f"a_stage:\n  a_modifiers:\n    {name}: {{targets: [Linear]}}\n")


def test_stages_of_training():
    with pytest.raises(BitpressError, match="line 2: run_type 'train'"):
        Recipe.of("a_stage:\n  run_type: train\n  a_modifiers: {AWQModifier: {bits: 4}}\n")


def test_a_hook_target_is_not_needed():
    stated = AWQMapping("re:.*norm", ["re:.*fc1"], activation_hook_target="mlp")
    assert stated == AWQMapping("re:.*norm", ["re:.*fc1"])
    assert Recipe.of(Recipe.of(AWQModifier(mappings=[stated])).to_yaml()).modifiers[0].mappings == [stated]


def test_observers_of_activations():
    scheme = W8A8_STATIC.model_copy(
        update={"input_activations": W8A8_STATIC.input_activations.model_copy(update={"observer": "mse"})}
    )
    from bitpress.modifiers.activations import check_group

    with pytest.raises(BitpressError, match="input_activations: observer 'mse' is not supported"):
        check_group("g", scheme)
    check_group("g", W8A8_STATIC)


# Arguments of oneshot.


def test_every_argument_of_its_oneshot_is_known(caplog):
    import inspect

    from bitpress import oneshot

    own = inspect.signature(oneshot).parameters
    theirs = {
        "model", "config_name", "tokenizer", "processor", "precision", "tie_word_embeddings",
        "trust_remote_code_model", "save_compressed", "model_revision", "recipe", "recipe_args",
        "clear_sparse_session", "stage", "dataset", "dataset_config_name", "dataset_path", "splits", "batch_size",
        "data_collator", "num_calibration_samples", "shuffle_calibration_samples", "max_seq_length",
        "pad_to_max_length", "text_column", "concatenate_data", "streaming", "overwrite_cache",
        "preprocessing_num_workers", "dataloader_num_workers", "min_tokens_per_module", "moe_calibrate_all_experts",
        "pipeline", "tracing_ignore", "sequential_targets", "sequential_offload_device",
        "quantization_aware_calibration", "sequential_prefetch", "output_dir", "log_dir", "raw_kwargs",
        "remove_columns", "preprocessing_func", "sequential_targets_per_subgraph", "propagate_error", "use_loss_mask",
    }  # fmt: skip
    assert theirs <= {*own, *ARGUMENTS}
    assert not set(own) & set(ARGUMENTS)
    # Its defaults are taken without a word.
    take_arguments({"precision": "auto", "model_revision": "main", "stage": None, "data_collator": "truncation"}, [])
    assert not caplog.records


def test_arguments_that_are_refused_or_warned_of(caplog):
    with pytest.raises(BitpressError, match=r"oneshot: streaming=True .*not supported: .*load_dataset"):
        take_arguments({"streaming": True}, [])
    with pytest.raises(BitpressError, match=r"data_collator=.*collate_fn"):
        take_arguments({"data_collator": max}, [])
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'max_seq_len'; did you mean 'max_seq_length'"):
        take_arguments({"max_seq_len": 3}, ["max_seq_length", "model"])
    take_arguments({"tracing_ignore": ["_update_causal_mask"]}, [])
    assert "nothing is traced" in caplog.text
