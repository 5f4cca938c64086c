import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from easyedit_nmke import NMKEHyperParams
from easyedit_nmke.hparams import shipped
from easyedit_nmke.methods import method_named, read

MINIMAL = {"layers": [0, 1], "model_name": "atlas"}


def write(tmp_path, content):
    path = tmp_path / "settings.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_defaults_are_the_published_codes():
    settings = NMKEHyperParams(**MINIMAL)
    assert (settings.attribution_strategy, settings.amplification, settings.attribution_target) == ("lps", 30.0, "predicted")
    assert (settings.attribution_norm, settings.neurons, settings.mask_ties) == ("frozen", "both", "include")
    assert (settings.general_bias, settings.general_scale, settings.general_power) == (0.3, 0.1, 3.0)
    assert (settings.specific_bias, settings.specific_scale, settings.specific_power) == (0.3, 0.1, 2.0)
    assert (settings.temperature, settings.nullspace_threshold, settings.kl_factor) == (30.0, 2e-2, 0.0625)


def test_the_shipped_files_are_sound_and_open_with_the_command_that_runs_them():
    expected = {"atlas", "llama3-8b", "llama3.1-8b", "qwen2.5-7b", "mistral-7b", "gpt2-xl", "gpt-j-6B", "smollm2", "gemma3-270m"}
    plus = {f"{name}-plus" for name in expected}
    assert set(shipped()) == expected | plus
    for name, path in shipped().items():
        assert path.read_text().startswith("# nmke ")
        assert NMKEHyperParams.from_hparams(name) == NMKEHyperParams.from_hparams(path)


def test_a_file_may_be_named_without_its_suffix_and_numbers_may_be_written_as_easyedit_does(tmp_path):
    path = write(tmp_path, "layers: [0]\nmodel_name: atlas\nv_lr: 1e-1\nlayer_module_tmp: 'model.layers.{}'\n")
    assert NMKEHyperParams.from_hparams(path.with_suffix("")).v_lr == 0.1


def test_every_problem_is_reported_in_one_message(tmp_path):
    path = write(tmp_path, {"layers": [3, 1], "amplificaton": 3, "neurons": "generl", "L2": 0, "v_num_grad_steps": 2.5, "fp16": 1})
    with pytest.raises(ValueError) as error:
        NMKEHyperParams.from_hparams(path)
    message = str(error.value)
    assert message.startswith(f"{path}: 7 problems")
    for part in (
        "'amplificaton' (did you mean 'amplification'?)", "'model_name' is missing", "layers must increase",
        "did you mean 'general'?",
        "L2 is 0", "v_num_grad_steps must be a whole number", "fp16 must be true or false",
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layers: [0", r"is not YAML: line 1, column 11: expected ',' or '\]'.*while parsing a flow sequence"),
        ("layers: [0]\nmodel_name: a: b", "is not YAML: line 2, column 14: mapping values are not allowed here"),
        ("layers: \0", "is not YAML: unacceptable character"),
        ("[" * 5000, "is not YAML: it is nested too deep"),
        ("- 1\n- 2", "one mapping"),
        ("", "one mapping"),
    ],
    ids=["open", "colons", "character", "deep", "list", "empty"],
)
def test_a_file_that_is_no_mapping(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        NMKEHyperParams.from_hparams(write(tmp_path, content))
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="llama3-8b"):
        NMKEHyperParams.from_hparams("nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "layers must be a list"),
        ({"layers": [0, 0]}, "without repetition"),
        ({"layers": [-1]}, "0 or more"),
        ({"alg_name": "ROME"}, "expected 'NMKE'"),
        ({"model_name": 3}, "model_name must be"),
        ({"fact_token": "last"}, "fact_token is 'last'"),
        ({"v_lr": float("nan")}, "v_lr is nan"),
        ({"v_lr": float("inf")}, "v_lr is inf"),
        ({"v_lr": "fast"}, "v_lr must be a number"),
        ({"general_bias": 0.95}, "general_bias \\+ general_scale"),
        ({"specific_ratio": 0}, "more than 0 and at most 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"dtype": "bf16"}, "dtype is 'bf16'.*expected one of 'float32', 'bfloat16', 'float16', 'auto'"),
        ({"dtype": "bfloat16", "fp16": True}, "fp16: true asks for float16, dtype for 'bfloat16'"),
        ({"mom2_dtype": "float16"}, "mom2_dtype is 'float16'"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"template_prefixes": "The"}, "list of words"),
        ({"P_loc": 3}, "P_loc"),
    ],
)
def test_values_that_cannot_be_used(changes, message):
    with pytest.raises(ValueError, match=message):
        NMKEHyperParams(**{**MINIMAL, **changes})


def test_values_assigned_later_are_checked_again():
    settings = NMKEHyperParams(**MINIMAL)
    settings.neurons = "some"
    settings.amplfication = 3
    with pytest.raises(ValueError, match=r"2 problems(.|\n)*neurons is 'some'(.|\n)*did you mean 'amplification'"):
        settings.validate()


def test_plain_data_round_trip():
    settings = NMKEHyperParams.from_hparams("atlas")
    assert NMKEHyperParams.from_dict(settings.to_dict()) == settings
    assert set(settings.to_dict()) == {field.name for field in dataclasses.fields(settings)} - {"state_dir"}


def test_a_model_and_its_tokenizer_have_a_name_that_easyedits_scorers_can_read():
    class Model:
        class config:
            model_type = "llama"

    pair = (Model(), object())
    settings = NMKEHyperParams(**{**MINIMAL, "model_name": pair})
    assert settings.model_name == pair and settings.model_name.lower() == "llama"
    settings.model_name = "atlas"
    settings.model_name = pair
    assert "t5" not in settings.model_name.lower()


BASELINES = ["AlphaEdit", "MEMIT", "ROME", "FT"]


@pytest.mark.parametrize("method", BASELINES)
def test_the_shipped_files_of_the_other_methods(method):
    expected = {"atlas", "gpt2-xl", "qwen2.5-7b", "smollm2", "gemma3-270m"}
    expected |= {"llama3-8b"} if method != "MEMIT" else set()  # EasyEdit has no such file
    assert set(shipped(method)) == expected
    for name, path in shipped(method).items():
        assert path.read_text().startswith(f"# nmke run --hparams {method}/{name} ")
        settings = method_named(method).hparams.from_hparams(name)
        assert settings == read(path) == read(f"{method}/{name}") and type(settings) is method_named(method).hparams
        assert type(settings).from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("LocFT-BF", {"atlas", "smollm2", "llama3-8b", "qwen2.5-7b", "mistral-7b"}),
        ("UltraEdit", {"atlas", "smollm2", "llama3-8b", "qwen2.5-7b"}),
        ("KNE", {"atlas", "smollm2"}),
    ],
)
def test_the_shipped_files_of_the_newer_methods(method, expected):
    assert set(shipped(method)) == expected
    for name, path in shipped(method).items():
        assert path.read_text().startswith(f"# nmke run --hparams {method}/{name} ")
        settings = read(f"{method}/{name}")
        assert settings == method_named(method).hparams.from_hparams(path) and settings.alg_name == method


def test_easyedits_own_ultraedit_files_load_as_they_are():
    home = os.environ.get("EASYEDIT_HOME")
    files = sorted(Path(home, "hparams", "UltraEdit").glob("*.yaml")) if home else []
    if not files:
        pytest.skip("EASYEDIT_HOME is not set to a checkout with hparams/")
    for file in files:
        assert read(file).alg_name == "UltraEdit" and read(file).inner_params


@pytest.mark.parametrize("method", BASELINES)
def test_easyedits_own_files_load_as_they_are(method):
    home = os.environ.get("EASYEDIT_HOME")
    files = sorted(Path(home, "hparams", method).glob("*.yaml")) if home else []
    if not files:
        pytest.skip("EASYEDIT_HOME is not set to a checkout with hparams/")
    for file in files:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if content.get("objective_optimization") == "promptz_last":  # EasyEdit cannot run this file either
            with pytest.raises(ValueError, match=r"1 problem\n.*did you mean 'prompt_last'"):
                read(file)
            continue
        settings = read(file)
        numbers = {f.name for f in dataclasses.fields(settings) if "most" in f.metadata}
        for name, value in content.items():
            assert getattr(settings, name) == (float(value) if name in numbers else value), (file, name)


def test_a_file_of_no_known_method(tmp_path):
    assert type(read(write(tmp_path, MINIMAL))) is NMKEHyperParams
    with pytest.raises(ValueError, match=r"alg_name is 'MEMITT' \(did you mean 'MEMIT'\?\); known methods: NMKE, AlphaEdit"):
        read(write(tmp_path, {**MINIMAL, "alg_name": "MEMITT"}))
    with pytest.raises(FileNotFoundError, match="come with the package: atlas, gemma3-270m, gpt2-xl"):
        read("MEMIT/nowhere")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("MEMIT", {"mom2_update_weight": 0}, "mom2_update_weight is 0, expected more than 0"),
        ("MEMIT", {"neurons": "both"}, "unexpected keyword|unknown"),
        ("ROME", {"context_template_length_params": [5, 10]}, "list of \\[tokens"),
        ("ROME", {"context_template_length_params": [[5, 3]]}, "at least one text for each of 5 prefixes"),
        ("ROME", {"mom2_adjustment": "yes"}, "mom2_adjustment must be true or false"),
        ("FT", {"norm_constraint": True}, "norm_constraint must be a number"),
        ("FT", {"norm_constraint": 0}, "norm_constraint is 0, expected more than 0"),
        ("FT", {"num_steps": 2.5}, "num_steps must be a whole number"),
        ("FT", {"objective_optimization": "prompt"}, "expected one of 'prompt_last', 'target_new'"),
    ],
)
def test_values_that_the_other_methods_cannot_use(method, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        method_named(method).hparams(**{**MINIMAL, **changes})


def test_whole_numbers_may_be_written_with_an_exponent_and_odd_yaml_is_one_message(tmp_path):
    assert (
        NMKEHyperParams.from_hparams(write(tmp_path, "layers: [0]\nmodel_name: atlas\nmom2_n_samples: 1e5\n")).mom2_n_samples
        == 100000
    )
    with pytest.raises(ValueError, match=r"4 problems(.|\n)*unknown name 'False'"):
        NMKEHyperParams.from_hparams(
            write(tmp_path, "layers: [0]\nmodel_name: atlas\nno: 1\nstats_dir: 7\nmom2_dataset: 5\ndevice: [0]\n")
        )


def test_a_preset_fills_in_what_a_file_leaves_out(tmp_path):
    path = write(tmp_path, {"layers": [0], "model_name": "atlas", "preset": "plus", "L2": 7})
    settings = NMKEHyperParams.from_hparams(path)
    assert (settings.write_passes, settings.neurons, settings.L2) == (3, "all", 7)
    assert NMKEHyperParams.from_dict({"layers": [0], "model_name": "atlas", "preset": "published"}) == NMKEHyperParams([0], "atlas")
    with pytest.raises(ValueError, match=r"preset is 'pluss' \(did you mean 'plus'\?\)"):
        NMKEHyperParams.from_dict({"layers": [0], "model_name": "atlas", "preset": "pluss"})


def test_options_that_contradict_each_other_are_refused():
    for options, message in (
        ({"solve": "restricted", "mask": "soft"}, "use one of the two"),
        ({"locality_factor": 1.0}, "locality_prompts is empty"),
        ({"key_contexts": "relations"}, "needs locality_prompts"),
        ({"locality_prompts": ["no place for it"]}, "one {} each"),
    ):
        with pytest.raises(ValueError, match=message):
            NMKEHyperParams([0], "atlas", **options)
