"""IncreLoraConfig: defaults, every check of an argument, the paper's values, saving and loading."""

import dataclasses
import json

import numpy as np
import pytest
from growing import growing
from increlora_rs import IncreLoraConfig
from peft import LoraConfig, PeftConfig, TaskType

OWN_DEFAULTS = {
    "r": 8,
    "init_r": None,
    "max_r": None,
    "total_step": None,
    "tinit": None,
    "deltaT": None,
    "growth_end": None,
    "top_h": None,
    "add_r": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": None,
    "init_lora_weights": True,
    "scaling": "budget",
    "advance_learning": None,
    "restart_warmup": True,
    "preserve_output": True,
    "importance_window": "auto",
    "importance_norm": "sqrt",
    "importance": "fluctuation",
    "budget_unit": None,
}

PAPER = {
    "r": 2,
    "init_r": 1,
    "lora_alpha": 16,
    "growth_end": 0.6,
    "beta1": 0.85,
    "beta2": 0.85,
    "init_lora_weights": "svd",
    "scaling": "rank",
    "orthogonality_weight": 0.1,
    "uses_reserve": True,
    "restart_warmup": True,
    "preserve_output": False,
    "importance_window": None,
    "importance_norm": "sqrt",
    "importance": "sensitivity",
    "budget_unit": "rank",
}

SUPPORTED = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
}
UNSUPPORTED = sorted(f.name for f in dataclasses.fields(LoraConfig) if f.init and f.name not in SUPPORTED)

WRONG_VALUES = [
    ("r", 0),
    ("r", -3),
    ("init_r", -1),
    ("max_r", 0),
    ("add_r", 0),
    ("lora_alpha", 0),
    ("lora_alpha", -1.0),
    ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")),
    ("lora_dropout", -0.1),
    ("lora_dropout", 1.0),
    ("lora_dropout", float("nan")),
    ("total_step", 0),
    ("tinit", -1),
    ("deltaT", 0),
    ("top_h", 0),
    ("growth_end", 0.0),
    ("growth_end", 1.01),
    ("growth_end", float("nan")),
    ("beta1", 1.0),
    ("beta1", -0.1),
    ("beta2", 1.5),
    ("beta2", float("nan")),
    ("orth_reg_weight", -0.1),
    ("orth_reg_weight", float("inf")),
    ("importance_window", 0),
    ("init_lora_weights", 1),
    ("init_lora_weights", None),
    ("scaling", "module"),
    ("importance_norm", "max"),
    ("importance", "weights"),
    ("budget_unit", "bytes"),
    ("bias", "some"),
    ("advance_learning", "yes"),
    ("restart_warmup", 1),
    ("preserve_output", None),
    ("use_rslora", "true"),
    ("fan_in_fan_out", 1),
]

WRONG_TYPES = [
    ("r", "8"),
    ("r", 2.0),
    ("r", True),
    ("r", None),
    ("init_r", 1.5),
    ("max_r", "4"),
    ("total_step", 10.0),
    ("tinit", "1"),
    ("deltaT", [1]),
    ("top_h", False),
    ("add_r", None),
    ("beta1", "0.9"),
    ("beta2", None),
    ("orth_reg_weight", True),
    ("lora_alpha", "16"),
    ("lora_alpha", None),
    ("lora_dropout", "0.1"),
    ("importance_window", "all"),
    ("importance_window", 4.0),
    ("rank_pattern", ["query"]),
    ("alpha_pattern", 3),
    ("target_modules", 5),
    ("target_modules", [1, 2]),
    ("exclude_modules", 3),
    ("modules_to_save", "classifier"),
    ("layers_to_transform", "first"),
    ("trainable_token_indices", 3),
    ("trainable_token_indices", ["one"]),
]


@pytest.mark.parametrize(("name", "value"), OWN_DEFAULTS.items())
def test_default_is_the_documented_one(name, value):
    assert getattr(IncreLoraConfig(), name) == value


@pytest.mark.parametrize(("name", "value"), PAPER.items())
def test_paper_sets_the_published_value(name, value):
    assert getattr(IncreLoraConfig.paper(), name) == value


@pytest.mark.parametrize("name", ["tinit", "deltaT", "top_h", "total_step"])
def test_paper_leaves_the_schedule_to_the_library(name):
    assert getattr(IncreLoraConfig.paper(), name) is None


def test_paper_yields_to_explicit_arguments():
    config = IncreLoraConfig.paper(r=8, preserve_output=True, lora_dropout=0.1)
    assert (config.r, config.preserve_output, config.lora_dropout, config.scaling) == (8, True, 0.1, "rank")


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_wrong_value_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError) as error:
        IncreLoraConfig(**{name: value})
    assert name in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "init",
    ["eva", "olora", "pissa", "pissa_niter_4", "corda", "loftq", "orthogonal", "lora_ga", "mica"],
)
def test_other_inits_of_lora_are_refused_with_the_choices(init):
    with pytest.raises(ValueError) as error:
        IncreLoraConfig(init_lora_weights=init)
    assert f"init_lora_weights={init!r}" in str(error.value)
    assert "'svd'" in str(error.value)


def test_unknown_task_type_is_refused():
    with pytest.raises(ValueError, match="task type: 'CLASSIFY'"):
        IncreLoraConfig(task_type="CLASSIFY")


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_wrong_type_is_refused_by_name_and_value(name, value):
    with pytest.raises(TypeError) as error:
        IncreLoraConfig(**{name: value})
    assert name in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("rank_pattern", -1, ValueError),
        ("rank_pattern", 2.0, TypeError),
        ("rank_pattern", True, TypeError),
        ("alpha_pattern", 0.0, ValueError),
        ("alpha_pattern", "8", TypeError),
    ],
)
def test_wrong_pattern_entry_is_refused_by_its_key(name, value, kind):
    with pytest.raises(kind) as error:
        IncreLoraConfig(**{name: {"good": 3, "layer.1.query": value}})
    assert f"{name}['layer.1.query']={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"r": 2, "init_r": 3}, ["r=2", "init_r=3"]),
        ({"r": 8, "max_r": 4}, ["max_r=4", "r=8"]),
        ({"total_step": 10, "tinit": 10}, ["tinit=10", "total_step=10"]),
        ({"advance_learning": True}, ["advance_learning=True", "init_lora_weights", "svd"]),
        (
            {"advance_learning": True, "init_lora_weights": False},
            ["advance_learning=True", "init_lora_weights", "False"],
        ),
    ],
)
def test_contradiction_is_refused_naming_both_sides(arguments, named):
    with pytest.raises(ValueError) as error:
        growing(**arguments)
    assert [text for text in named if text not in str(error.value)] == []


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_option_of_lora_is_refused_by_name(name):
    with pytest.raises(ValueError) as error:
        IncreLoraConfig(**{name: ["a value"]})
    assert f"{name}=['a value'] is not supported" in str(error.value)


def test_known_unsupported_options_are_all_found():
    known = {"use_bdlora", "loftq_config", "layer_replication", "lora_bias"}
    assert known - set(UNSUPPORTED) == set()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_option_at_its_default_is_accepted(name):
    default = getattr(LoraConfig(), name)
    assert getattr(IncreLoraConfig(**{name: default}), name) == default


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", np.int64(4)),
        ("lora_alpha", np.float32(8.0)),
        ("lora_alpha", 0.5),
        ("lora_dropout", 0),
        ("beta1", 0.0),
        ("tinit", 0),
        ("growth_end", 1),
        ("orth_reg_weight", 0),
        ("importance_window", 1),
        ("importance_window", None),
        ("max_r", 8),
        ("task_type", TaskType.SEQ_CLS),
        ("target_modules", ("query", "value")),
        ("layers_to_transform", 1),
    ],
)
def test_value_on_the_edge_is_accepted(name, value):
    assert getattr(growing(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("arguments", "reserve"),
    [
        ({}, False),
        ({"init_lora_weights": False}, False),
        ({"init_lora_weights": "svd"}, True),
        ({"init_lora_weights": "svd", "advance_learning": False}, False),
        ({"init_lora_weights": "svd", "advance_learning": True}, True),
        ({"advance_learning": False}, False),
    ],
)
def test_reserve_is_used_where_the_init_is_svd(arguments, reserve):
    assert growing(**arguments).uses_reserve is reserve


@pytest.mark.parametrize(
    ("arguments", "weight"),
    [
        ({}, 0.0),
        ({"init_lora_weights": False}, 0.0),
        ({"init_lora_weights": "svd"}, 0.1),
        ({"init_lora_weights": "svd", "orth_reg_weight": 0.0}, 0.0),
        ({"orth_reg_weight": 0.3}, 0.3),
    ],
)
def test_regulariser_is_weighted_where_the_init_is_svd(arguments, weight):
    assert growing(**arguments).orthogonality_weight == weight


@pytest.mark.parametrize(
    ("arguments", "rank", "scale"),
    [
        ({"r": 4}, 1, 4.0),
        ({"r": 4}, 7, 4.0),
        ({"r": 4, "scaling": "rank"}, 1, 16.0),
        ({"r": 4, "scaling": "rank"}, 2, 8.0),
        ({"r": 4, "scaling": "rank"}, 0, 16.0),
        ({"r": 4, "use_rslora": True}, 9, 8.0),
        ({"r": 4, "scaling": "rank", "use_rslora": True}, 16, 4.0),
    ],
)
def test_scale_divides_alpha_by_budget_or_rank(arguments, rank, scale):
    assert growing(**arguments).scale(16, rank) == scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance_norm": "mean"}, "leave it out, or set importance='sensitivity'"),
        (
            {"beta1": 0.9, "importance_window": 20},
            "beta1=0.9 does not apply to importance='gradient', which is not smoothed, with importance",
        ),
        ({"beta2": 0.9, "importance_window": None}, "beta2=0.9 does not apply to importance='gradient'"),
        ({"preserve_output": False}, "preserve_output=False needs scaling='rank'"),
        (
            {"importance": "gradient", "importance_norm": "mean"},
            "importance_norm='mean' does not apply to importance='gradient'",
        ),
    ],
)
def test_options_that_contradict_each_other_are_both_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        growing(**arguments)


@pytest.mark.parametrize(
    ("arguments", "follows"),
    [
        ({}, True),
        ({"importance": "sensitivity"}, False),
        ({"init_lora_weights": "svd"}, False),
        ({"init_lora_weights": "svd", "advance_learning": False}, True),
    ],
)
def test_new_components_follow_the_gradient_where_that_can_be(arguments, follows):
    assert growing(**arguments).follows_gradient == follows


def test_the_paper_form_takes_the_gradient_importance_and_keeps_its_reserve():
    paper = IncreLoraConfig.paper(importance="gradient")
    assert paper.uses_reserve and not paper.follows_gradient
    assert IncreLoraConfig.paper(importance="gradient", advance_learning=False).follows_gradient


@pytest.mark.parametrize("load", [IncreLoraConfig.from_pretrained, PeftConfig.from_pretrained])
@pytest.mark.parametrize(
    "config",
    [
        IncreLoraConfig(),
        IncreLoraConfig.paper(target_modules=["query", "value"], lora_dropout=0.1),
        IncreLoraConfig(
            r=6,
            init_r=2,
            max_r=12,
            total_step=900,
            tinit=40,
            deltaT=20,
            top_h=3,
            add_r=2,
            lora_alpha=24,
            target_modules=r".*\.(query|key)",
            rank_pattern={"^bert.encoder.layer.0.attention.self.query": 3},
            alpha_pattern={"key": 7},
            use_rslora=True,
            bias="lora_only",
            modules_to_save=["classifier"],
            task_type="SEQ_CLS",
            importance_window=30,
            importance="sensitivity",
            importance_norm="mean",
        ),
        IncreLoraConfig(importance="gradient", budget_unit="parameters"),
    ],
    ids=["default", "paper", "all set", "gradient"],
)
def test_saved_configuration_comes_back_equal(config, load, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert type(loaded) is IncreLoraConfig
    assert loaded.to_dict() == config.to_dict()


def test_saved_configuration_names_its_type(tmp_path):
    IncreLoraConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "INCRELORA"


def test_saved_wrong_value_is_refused_at_loading(tmp_path):
    IncreLoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling": "none"}))
    with pytest.raises(ValueError, match="scaling='none'"):
        IncreLoraConfig.from_pretrained(str(tmp_path))


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="target_rank"):
        IncreLoraConfig(target_rank=8)


def test_patterns_are_not_shared_between_configurations():
    IncreLoraConfig().rank_pattern["query"] = 4
    assert IncreLoraConfig().rank_pattern == {}


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path):
    config = growing(
        r=np.int64(4),
        lora_alpha=np.float32(6),
        beta1=np.float64(0.5),
        use_rslora=np.bool_(True),
        rank_pattern={"a": np.int32(2)},
    )
    config.save_pretrained(tmp_path)
    again = IncreLoraConfig.from_pretrained(tmp_path)
    assert (again.r, again.lora_alpha, again.beta1, again.use_rslora) == (4, 6.0, 0.5, True)
    assert again.rank_pattern == {"a": 2}


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_what_is_no_regular_expression_is_refused_by_name(name):
    value = {"(": 2} if name.endswith("pattern") else "("
    with pytest.raises(ValueError, match=f"{name}='.'.*no regular expression"):
        growing(**{name: value})
