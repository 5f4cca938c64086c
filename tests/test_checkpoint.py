"""A whole model's export is its base's folder with the edited tensors in it; what was written is loaded again before it counts."""

import dataclasses
import json
import os
import shutil
import subprocess
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import before, down, same_bits, some_updates

from easyedit_nmke import atlas as embedded
from easyedit_nmke.history import checkpoint, export, readback
from easyedit_nmke.models.arch import ModelView

# As transformers 4 writes them, by hand: what 5 writes is read otherwise there.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
    "max_position_embeddings": 256, "rms_norm_eps": 1e-05, "initializer_range": 0.2, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False, "use_cache": True,
    "rope_theta": 500000.0, "torch_dtype": "float32", "transformers_version": "4.57.1",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
TOKENIZER = {
    "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "clean_up_tokenization_spaces": False, "model_max_length": 256,
    "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {
        str(i): dict(content=text, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
        for i, text in enumerate(("<s>", "</s>", "<pad>"))
    },
}  # fmt: skip
OTHERS = {
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE",
    "NOTICE.txt",
}  # fmt: skip
FIRST = "model.layers.0.mlp.down_proj.weight"


def loaded(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def split(tensors, shards=3):
    """shard number -> its tensors; the edited layers 0 and 2 lie in the first two."""
    names = sorted(tensors)
    third = len(names) // 3
    return [{name: tensors[name] for name in part} for part in (names[:third], names[2 * third :], names[third : 2 * third])]


@pytest.fixture
def base(tmp_path):
    """base(kind="safetensors", dtype=float32, rename=...) -> the folder of a random model in the style of Llama 3."""

    def make(kind="safetensors", dtype=torch.float32, rename=lambda name: name):
        from transformers import AutoModelForCausalLM, LlamaConfig

        folder = tmp_path / "base"
        folder.mkdir()
        content = {**deepcopy(CONFIG), "torch_dtype": str(dtype).removeprefix("torch.")}  # a copy: the library writes into it
        (folder / "config.json").write_text(json.dumps(content, indent=1))  # not as this library would print it
        (folder / "generation_config.json").write_text('{"bos_token_id": 0,\r\n "eos_token_id": [1]}')
        (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=3))
        shutil.copyfile(embedded.DIRECTORY / "tokenizer.json", folder / "tokenizer.json")
        for name in ("chat_template.jinja", "LICENSE", "NOTICE.txt", "README.md", ".gitattributes", "optimizer.pt"):
            (folder / name).write_text(f"the base's {name}\r\n")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**content)).to(dtype)
        tensors = {rename(name): tensor for name, tensor in model.state_dict().items()}
        save, end, stem = {
            "safetensors": (lambda t, f: save_file(t, f, {"format": "pt", "by": "hand"}), "safetensors", "model"),
            "bin": (torch.save, "bin", "pytorch_model"),
            "legacy": (lambda t, f: torch.save(t, f, _use_new_zipfile_serialization=False), "bin", "pytorch_model"),
        }[kind.split("-")[0]]
        if not kind.endswith("-sharded"):
            save(tensors, folder / f"{stem}.{end}")
            return folder
        files = {f"{stem}-0000{i}-of-00003.{end}": part for i, part in enumerate(split(tensors), 1)}
        for name, part in files.items():
            save(part, folder / name)
        index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in files.items() for name in part}}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index, indent=5))
        return folder

    return make


@pytest.fixture
def exported(base, tmp_path):
    """exported(kind, base's dtype, model's dtype, **export) -> (base folder, export's folder, edited model, report)."""

    def make(kind="safetensors", stored=torch.float32, held=torch.float32, rename=lambda name: name, **options):
        folder = base(kind, stored, rename)
        model, tok = loaded(folder, held)
        some_updates(model)
        report = export.export_model(model, tok, tmp_path / "out", card(folder), **options)
        return folder, tmp_path / "out", model, report

    return make


def card(folder):
    return export.Card(str(folder), "0", "NMKE", 5, "2026-01-31")


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- the folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "safetensors-sharded"])
def test_every_byte_but_the_edited_tensors_is_the_bases(kind, stored, exported):
    folder, out, model, _ = exported(kind, stored, stored)
    was, now = files(folder), files(out)
    assert was.keys() - now.keys() == {".gitattributes", "optimizer.pt"} and now.keys() - was.keys() == {"README.base.md"}
    assert now.pop("README.base.md") == was.pop("README.md") and "Read back" in now.pop("README.md").decode()
    changed = {name for name in now if now[name] != was[name]}
    assert changed == ({"model.safetensors"} if kind == "safetensors" else {f"model-0000{i}-of-00003.safetensors" for i in (1, 2)})
    edited = down(model)
    for name in changed:
        assert len(was[name]) == len(now[name])
        old, new = load_file(folder / name), load_file(out / name)
        assert {key for key in old if not torch.equal(old[key], new[key])} == edited.keys() & old.keys()
        assert all(torch.equal(new[key], edited[key]) for key in edited.keys() & old.keys())
        head = 8 + int.from_bytes(was[name][:8], "little")
        assert was[name][:head] == now[name][:head]


def test_the_base_of_rotary_embeddings_and_the_tokenizer_are_the_bases(exported):
    folder, out, model, _ = exported()
    again, tok = loaded(out)
    assert again.config.rope_parameters == loaded(folder)[0].config.rope_parameters
    assert again.config.rope_parameters["rope_theta"] == 500000.0 and again.config.rope_parameters["rope_type"] == "llama3"
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 500000.0
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert same_bits(again.state_dict(), model.state_dict()) and tok("a b").input_ids == loaded(folder)[1]("a b").input_ids


@pytest.mark.parametrize("kind", ["bin", "legacy", "bin-sharded"])
def test_pickled_weights_become_safetensors_of_the_same_tensors(kind, exported):
    folder, out, model, _ = exported(kind)
    assert not list(out.glob("*.bin*")) and "pytorch_model.bin as safetensors" in (out / "README.md").read_text()
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert same_bits(stored, dict(model.state_dict()))
    if kind == "bin-sharded":
        was = json.loads((folder / "pytorch_model.bin.index.json").read_text())
        now = json.loads((out / "model.safetensors.index.json").read_text())
        assert now["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
        assert now["weight_map"] == {
            name: file.replace("pytorch_model", "model").replace(".bin", ".safetensors") for name, file in was["weight_map"].items()
        }
        assert {file.name for file in out.glob("model-*")} == set(now["weight_map"].values())
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in OTHERS)


def test_what_rounding_costs_is_told(exported):
    folder, out, model, report = exported(stored=torch.bfloat16)
    original, stored = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    lost, whole = [], []
    for layer in (0, 2):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        edited = model.get_parameter(name).detach()
        assert torch.equal(stored[name], edited.bfloat16())
        lost.append((stored[name].double() - edited.double()).norm())
        whole.append((edited.double() - original[name].double()).norm())
        assert report.errors[layer] == pytest.approx((lost[-1] / whole[-1]).item()) and report.errors[layer] > 1e-3
    assert report.total == pytest.approx((torch.stack(lost).norm() / torch.stack(whole).norm()).item())
    assert report.dtype == "bfloat16" and f"layer 2 {report.errors[2]:.2%}" in str(report)
    assert f"rounding leaves out {report.total:.2%} of the edits" in (out / "README.md").read_text()
    assert "dtype=torch.bfloat16" in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", ["safetensors", "safetensors-sharded", "bin"])
def test_a_wider_dtype_keeps_more_and_the_configuration_says_so(kind, exported):
    folder, out, model, report = exported(kind, torch.bfloat16, dtype=torch.float32)
    assert report.total == 0 and report.dtype == "float32"
    was, now = (json.loads((where / "config.json").read_text()) for where in (folder, out))
    assert was == {**now, "torch_dtype": "bfloat16"} and now["torch_dtype"] == "float32"
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    edited = down(model)
    assert all(torch.equal(stored[name], edited[name]) for name in edited)
    assert {tensor.dtype for name, tensor in stored.items() if name not in edited} == {torch.bfloat16}
    assert same_bits(loaded(out, "auto")[0].state_dict(), model.state_dict())
    if kind == "safetensors-sharded":
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
        assert (out / "model-00003-of-00003.safetensors").read_bytes() == (folder / "model-00003-of-00003.safetensors").read_bytes()


def test_a_dtype_that_cannot_hold_the_bases_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="dtype is float16, which cannot hold the base's bfloat16; give float32"):
        exported(stored=torch.bfloat16, dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_masters_are_written_where_the_files_can_hold_them(base, tmp_path):
    folder = base(dtype=torch.bfloat16)
    model, tok = loaded(folder, torch.bfloat16)
    masters = {layer: weight.float() for layer, weight in before(model).items()}
    for seed, (name, master) in enumerate(masters.items()):
        master += torch.randn(master.shape, generator=torch.Generator().manual_seed(seed)) / 100
        ModelView(model).matrix(name).copy_(master)
    report = export.export_model(model, tok, tmp_path / "wide", card(folder), torch.float32, masters)
    stored = load_file(tmp_path / "wide" / "model.safetensors")
    assert report.total == 0 and all(torch.equal(stored[name], masters[name]) for name in down(model))
    report = export.export_model(model, tok, tmp_path / "same", card(folder), None, masters)
    stored = load_file(tmp_path / "same" / "model.safetensors")
    assert 0 < report.total < 1 and same_bits({name: stored[name] for name in down(model)}, down(model))


def test_a_model_held_coarser_than_its_base_adds_the_edit_alone(exported):
    folder, out, model, _ = exported(held=torch.bfloat16)
    old, new, now = load_file(folder / "model.safetensors")[FIRST], load_file(out / "model.safetensors")[FIRST], down(model)[FIRST]
    untouched = old.bfloat16() == now
    assert 0.1 < untouched.float().mean() < 0.9  # neurons that no mask kept
    assert torch.equal(new[untouched], old[untouched]) and not torch.equal(old, old.bfloat16().float())
    torch.testing.assert_close(new - old, now.float() - old.bfloat16().float(), rtol=0, atol=1e-7)


# ---- names


def test_tensors_without_the_models_prefix_are_found(exported):
    _, out, model, _ = exported(rename=lambda name: name.removeprefix("model."))
    stored = load_file(out / "model.safetensors")
    assert "layers.0.mlp.down_proj.weight" in stored and FIRST not in stored
    assert same_bits({f"model.{name}" if name != "lm_head.weight" else name: t for name, t in stored.items()}, model.state_dict())


def test_tied_weights_and_a_transposed_family(tiny, tmp_path):
    model, tok = tiny("gpt2")
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    edited = deepcopy(model)
    some_updates(edited)
    with torch.no_grad():
        edited.transformer.h[1].mlp.c_proj.bias += 0.1  # as fine-tuning does
    masters = {layer: weight.clone() for layer, weight in before(edited).items()}
    report = export.export_model(edited, tok, tmp_path / "out", card(folder), None, masters)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert report.total == 0 and report.errors == {0: 0, 1: 0, 2: 0}
    assert same_bits({f"transformer.{name}": tensor for name, tensor in stored.items()}, without_head(edited))


def without_head(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def test_tensors_that_cannot_be_told_are_refused(base, tmp_path):
    folder = base()
    model, tok = loaded(folder)
    some_updates(model)
    tensors = load_file(folder / "model.safetensors")
    other = {name: tensor for name, tensor in tensors.items() if name != FIRST}
    for content, said in (
        (other, "is none of the tensors"),
        ({**other, f"a.{FIRST}": tensors[FIRST], f"b.{FIRST}": tensors[FIRST].clone()}, "is more than one of the tensors"),
        ({**tensors, FIRST: tensors[FIRST][:, :7].clone()}, r"has the shape \[32, 7\]"),
        ({**tensors, FIRST: tensors[FIRST].to(torch.float8_e4m3fn)}, "stored as float8_e4m3fn; export the edits alone"),
    ):
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=said):
            export.export_model(model, tok, tmp_path / "out", card(folder))
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


# ---- where the base lies


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_hub_name_is_found_in_the_hubs_cache(base, tmp_path, monkeypatch, revision):
    """At the revision that was edited; of another there is nothing here."""
    from huggingface_hub import constants

    folder, cache = base(), tmp_path / "hub"
    place = cache / "models--some--llama" / "snapshots" / ("a" * 40)
    (cache / "models--some--llama" / "refs").mkdir(parents=True)
    (cache / "models--some--llama" / "refs" / (revision or "main")).write_text("a" * 40)
    place.mkdir(parents=True)
    (cache / "models--some--llama" / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, cache / "models--some--llama" / "blobs" / str(number))
        (place / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    model, tok = loaded(folder)
    originals, updates = before(model), some_updates(model)
    about = dataclasses.replace(card("some/llama"), revision=revision)
    export.export_model(model, tok, tmp_path / "out", about)
    export.export_delta(model, updates, originals, tmp_path / "delta", about)
    export.export_lora(model, updates, tmp_path / "lora", about)
    for name in ("delta", "lora"):
        told = (tmp_path / name / "README.md").read_text()
        assert "onto the base model loaded anew" in told or "into the base model loaded anew" in told
        assert ("| Revision | v1 |" in told and told.count("'some/llama', revision='v1'") == 2) == (revision == "v1")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["revision"] == revision
    for name in OTHERS:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
        assert not (tmp_path / "out" / name).is_symlink()
    assert "base_model: some/llama" in (tmp_path / "out" / "README.md").read_text()
    assert same_bits(loaded(tmp_path / "out")[0].state_dict(), model.state_dict())


def test_a_model_in_memory_is_written_by_the_library_and_the_card_says_who_reads_it(tiny, tmp_path):
    import transformers

    model, tok = tiny("llama")
    assert export.export_model(model, tok, tmp_path / "out", card("(model, tok)")) is None
    told = (tmp_path / "out" / "README.md").read_text()
    assert f"written by transformers {transformers.__version__}, for this major version and later" in told and "Read back" in told
    with pytest.raises(ValueError, match=r"dtype is float32, but the files of '\(model, tok\)' are not here"):
        export.export_model(model, tok, tmp_path / "other", card("(model, tok)"), torch.float32)
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf" / "tf_model.h5").write_text("weights of another kind")
    assert export.export_model(model, tok, tmp_path / "again", card(tmp_path / "tf")) is None
    originals, updates = before(model), some_updates(model)
    export.export_delta(model, updates, originals, tmp_path / "delta", card(tmp_path / "tf"))
    export.export_lora(model, updates, tmp_path / "lora", card(tmp_path / "tf"))
    for name, told in (("delta", "into the model in memory"), ("lora", "not by PEFT, as the base model lies in no folder here")):
        assert told in (tmp_path / name / "README.md").read_text()


def test_the_embedded_model_is_a_base_folder_too(atlas, tmp_path):
    model, tok = atlas
    some_updates(model)
    report = export.export_model(model, tok, tmp_path / "out", card("atlas"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (embedded.DIRECTORY / name).read_bytes()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert report.dtype == "bfloat16" and all(torch.equal(stored[n], w.bfloat16()) for n, w in down(model).items())


# ---- read back


def spoilt(monkeypatch, place, name, spoil):
    """Calls of place.name are followed by spoil(*its arguments)."""
    own = getattr(place, name)

    def wrapped(*args, **options):
        result = own(*args, **options)
        spoil(*args)
        return result

    monkeypatch.setattr(place, name, wrapped)


def reworked(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["edited", "unedited", "rotary", "tokenizer", "missing"])
def test_a_model_that_comes_back_as_another_is_not_exported(part, base, tmp_path, monkeypatch):
    folder = base()
    model, tok = loaded(folder)
    some_updates(model)
    was = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def nudge(name):
        return lambda tensors: tensors[name].view(-1)[7].add_(1e-6)

    def spoil(model, base, into, *_):
        if part == "edited":
            reworked(into / "model.safetensors", nudge(FIRST))
        elif part == "unedited":
            reworked(into / "model.safetensors", nudge("model.layers.1.self_attn.q_proj.weight"))
        elif part == "rotary":
            config = json.loads((into / "config.json").read_text())
            (into / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
        elif part == "tokenizer":
            text = json.loads((into / "tokenizer.json").read_text())
            text["model"]["merges"] = text["model"]["merges"][:50]
            (into / "tokenizer.json").write_text(json.dumps(text))
        else:
            (into / "model.safetensors").unlink()

    spoilt(monkeypatch, export, "write_checkpoint", spoil)
    said = {
        "edited": f"differs from the edited model in {FIRST}", "unedited": r"in model\.layers\.1\.self_attn\.q_proj\.weight",
        "rotary": "gives other logits", "tokenizer": "the tokenizer read back makes other tokens",
        "missing": "cannot be loaded again",
    }[part]  # fmt: skip
    with pytest.raises(RuntimeError, match=said):
        export.export_model(model, tok, tmp_path / "out", card(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["base"] and same_bits(was, model.state_dict())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_is_read_back_on_its_base(dtype, known, base, tmp_path, monkeypatch):
    folder = base(dtype=dtype)
    model, _ = loaded(folder, dtype)
    originals, updates = before(model), some_updates(model)
    made = card(folder if known else "no/folder")
    was = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export.export_delta(model, updates, originals, tmp_path / "out", made)
    told = (tmp_path / "out" / "README.md").read_text()
    assert ("into the base model loaded anew; every parameter equal to the bit" if known else "into the model in memory") in told
    spoilt(monkeypatch, export, "save_delta", lambda file, *_: file.write_bytes(file.read_bytes()[:-1] + b"x"))
    with pytest.raises(RuntimeError, match="the delta read back is not the edited model"):
        export.export_delta(model, updates, originals, tmp_path / "bad", made)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"} and same_bits(was, model.state_dict())


def test_a_delta_of_another_base_is_not_exported(base, tmp_path):
    folder = base()
    model, _ = loaded(folder)
    originals, updates = before(model), some_updates(model)
    reworked(folder / "model.safetensors", lambda tensors: tensors["lm_head.weight"][3].add_(1))
    with pytest.raises(RuntimeError, match=r"differs from the edited model in lm_head\.weight"):
        export.export_delta(model, updates, originals, tmp_path / "out", card(folder))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_read_back_by_peft(dtype, rank, base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    folder = base(dtype=dtype)
    model, _ = loaded(folder, dtype)
    updates = some_updates(model)
    was = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export.export_lora(model, updates, tmp_path / "out", card(folder), rank)
    told = (tmp_path / "out" / "README.md").read_text()
    assert "by PEFT onto the base model loaded anew: logits of 3 prompts within" in told
    monkeypatch.setattr(readback.importlib.util, "find_spec", lambda name: None)
    export.export_lora(model, updates, tmp_path / "arithmetic", card(folder), rank)
    assert "not by PEFT, which is not installed here, but by arithmetic" in (tmp_path / "arithmetic" / "README.md").read_text()
    spoilt(monkeypatch, export, "save_file", lambda tensors, file, **_: reworked(file, lambda t: next(iter(t.values())).mul_(1.01)))
    with pytest.raises(RuntimeError, match="the adapter read back holds other factors"):
        export.export_lora(model, updates, tmp_path / "bad", card(folder), rank)
    monkeypatch.undo()
    own = export.low_rank
    monkeypatch.setattr(export, "low_rank", lambda *args: (own(*args)[0] * 1.05, *own(*args)[1:]))
    with pytest.raises(RuntimeError, match="the adapter read back leaves out"):
        export.export_lora(model, updates, tmp_path / "bad", card(folder), rank)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out", "arithmetic"} and same_bits(was, model.state_dict())


def test_an_adapter_that_peft_reads_otherwise_is_not_exported(base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    folder = base()
    model, _ = loaded(folder)
    updates, own = some_updates(model), export._lora_config
    monkeypatch.setattr(export, "_lora_config", lambda *args: {**own(*args), "lora_alpha": 1})
    with pytest.raises(RuntimeError, match="gives other logits"):
        export.export_lora(model, updates, tmp_path / "out", card(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# ---- other systems


def test_folders_that_cannot_be_opened_are_written_all_the_same(edited, tmp_path, monkeypatch):
    """As on Windows; what else is particular there is in test_files."""
    _, model, updates, originals = edited
    (tmp_path / "out").mkdir()
    own = os.open

    def opening(path, flags, *rest):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return own(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opening)
        export.export_delta(model, updates, originals, tmp_path / "out", card("no/folder"))
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.fixture
def edited(tiny):
    model, _ = tiny("llama")
    originals = before(model)
    return None, model, some_updates(model), originals


# ---- an older transformers

OLD = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {"transformers": transformers.__version__}
for folder in sys.argv[1:]:
    model, tok = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    model.eval()
    ids = tok("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
        logits = model(ids).logits
    found[folder] = {
        "ids": ids.tolist(), "said": tok.decode(out[0]), "logits": logits[0].tolist(), "rope_theta": model.config.rope_theta,
        "rope_scaling": model.config.rope_scaling,
    }
json.dump(found, sys.stdout)
"""


@pytest.mark.old_transformers
@pytest.mark.skipif("NMKE_OLD_PYTHON" not in os.environ, reason="NMKE_OLD_PYTHON names no python with transformers 4.57")
def test_an_older_transformers_answers_as_edited(base, atlas, tmp_path, record_property):
    llama = base("safetensors-sharded", torch.bfloat16)
    made = {}
    for name, source, (model, tok) in (("atlas", "atlas", atlas), ("llama", llama, loaded(llama))):
        ids = tok("The capital of France is", return_tensors="pt").input_ids
        with torch.no_grad():
            unedited = model(ids).logits[0]
            some_updates(model)
            for place, weight in before(model).items():
                ModelView(model).matrix(place).copy_(weight.bfloat16())  # as it will be stored
            assert export.export_model(model, tok, tmp_path / name, card(source)).total == 0
            said = tok.decode(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)[0])
            made[name] = (unedited, model(ids).logits[0], ids.tolist(), said)
    argv = [os.environ["NMKE_OLD_PYTHON"], "-c", OLD, *(str(tmp_path / name) for name in made)]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=500, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["transformers"].startswith("4."), found["transformers"]
    for name, (unedited, wanted, ids, said) in made.items():
        got = found[str(tmp_path / name)]
        logits = torch.tensor(got["logits"])
        worst = ((logits - wanted).norm() / wanted.norm()).item()
        record_property(name, worst)
        print(f"{name}: transformers {found['transformers']} {got['said']!r}, logits within {worst:.1e}")  # noqa: T201
        assert got["ids"] == ids and got["said"] == said
        assert worst < 1e-5 < 1e-2 < (unedited - wanted).norm() / wanted.norm()
    assert found[str(tmp_path / "llama")]["rope_theta"] == 500000.0
    assert found[str(tmp_path / "llama")]["rope_scaling"]["rope_type"] == "llama3"
    assert checkpoint.Base.find(tmp_path / "llama").index
