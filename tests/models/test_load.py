"""Checkpoints become parameters: streamed, exact, and refused by name when they are not what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support import parity, xla
from tx_async.errors import BaseModelError
from tx_async.models import load, tensor_files
from tx_async.models.decoder import unembedding
from tx_async.models.families import FAMILIES
from tx_async.models.load import load_model
from tx_async.testing.models import (
    DEEPSEEK_V3_TINY,
    GPT_OSS_TINY,
    LLAMA_TINY,
    QWEN3_5_MOE_TINY,
    QWEN3_TINY,
    make_deepseek_v3,
    make_llama,
    make_model,
    make_qwen3,
    random_tensors,
)

INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}
"""Of Kimi K2 Thinking and K2.5."""


def equal(params, others) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu2"}, "hidden_act 'relu2'"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding_window is missing"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding_attention"),
        ({"layer_types": ["full_attention", "mamba"], "use_sliding_window": True}, "layer_types .*mamba"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' lacks"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' lacks 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config 'gptq int4'"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "'modelopt NVFP4'"),
        ({"quantization_config": INT4}, "'compressed-tensors pack-quantized int4'"),
        ({"architectures": ["KimiK25ForConditionalGeneration"]}, "KimiK25ForConditionalGeneration is not supported"),
        ({"architectures": ["LlamaForCausalLM"], "use_sliding_window": True}, "use_sliding_window True"),
        ({"architectures": ["Gemma3ForCausalLM"], "final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"vision_config": {}}, "has a vision_config and no text_config"),
        (
            {"architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM is not supported; known: Qwen2",
        ),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
    ],
)
def test_what_changes_the_numbers_and_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(BaseModelError, match=message):
        load.from_config(QWEN3_TINY | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"mlp_layer_types": ["dense", "linear", "sparse"]}, "mlp_layer_types"),
    ],
)
def test_deepseek_refuses_other_routers_by_name(change, message):
    with pytest.raises(BaseModelError, match=message):
        load.from_config(DEEPSEEK_V3_TINY | change)


def test_a_folder_of_kimi_k2_is_read_as_deepseek_v3():
    """Its class is DeepSeek V3's; what it brings beside is code, which is never run."""
    kimi = {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    one_group = DEEPSEEK_V3_TINY | {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
    assert load.from_config(one_group | kimi | {"quantization_config": fp8}) == load.from_config(one_group)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_missing_unknown_and_mis_shaped_tensors_are_refused_by_name(tmp_path):
    folder, name = make_qwen3(tmp_path, tokenizer=False), "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1].copy()}))
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \[127, 64\]"):
        load_model(folder)
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(BaseModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)
    rewrite(make_qwen3(tmp_path), lambda tensors: tensors.update({"model.layers.0.extra.weight": np.zeros(3, "f4")}))
    with pytest.raises(BaseModelError, match=r"does not have: model\.layers\.0\.extra\.weight"):
        load_model(folder)


def test_biases_that_the_config_does_not_announce_are_refused(tmp_path):
    folder = make_llama(tmp_path, tokenizer=False, attention_bias=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_TINY))
    with pytest.raises(BaseModelError, match=r"q_proj\.bias"):
        load_model(folder)


def test_a_truncated_file_and_a_missing_shard_are_named(tmp_path):
    folder = make_qwen3(tmp_path, tokenizer=False)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="truncated"):
        load_model(folder)
    path.unlink()
    with pytest.raises(BaseModelError, match=r"lacks model\.safetensors"):
        load_model(folder)
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        load_model(folder.parent / "..")


def test_a_hub_name_that_cannot_be_had_says_so():
    with pytest.raises(BaseModelError, match="nobody/nothing is not a folder here, nor complete in the cache"):
        load_model("nobody/nothing")


def test_sharded_checkpoints_and_small_chunks_give_the_same_parameters(tmp_path, monkeypatch):
    _, whole = load_model(make_deepseek_v3(tmp_path / "whole", tokenizer=False))
    folder = make_deepseek_v3(tmp_path / "cut", tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(load, "CHUNK_BYTES", 3_000)
    reports = []
    _, cut = load_model(folder, progress=lambda *report: reports.append(report))
    equal(cut, whole)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert reports[-1] == ("loading weights", stored, stored)
    assert [done for _, done, _ in reports] == sorted({done for _, done, _ in reports})


def test_tied_models_hold_the_embedding_once(tmp_path):
    folder = make_qwen3(tmp_path, tokenizer=False, tie_word_embeddings=True)
    _, params = load_model(folder)
    assert "head" not in params and unembedding(params) is params["embed"]
    # Some files hold a copy of the tied head: it is passed over, as in transformers.
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((320, 64), "f4")}))
    equal(load_model(folder)[1], params)


INNER = (("model.language_model.", "lm_head."), ("model.visual.blocks.0.weight", "mtp.layers.0.weight"))
OUTER = (("language_model.model.", "language_model.lm_head."), ("vision_tower.conv.weight", "multi_modal_projector.w"))
SEEING = [
    ("Qwen3_5ForConditionalGeneration", "qwen3_5", INNER),
    ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", INNER),
    ("Gemma3ForConditionalGeneration", "gemma3", INNER),
    ("Mistral3ForConditionalGeneration", "mistral", INNER),
    ("Mistral3ForConditionalGeneration", "mistral_window", OUTER),
    ("Mistral3ForConditionalGeneration", "ministral3", OUTER),
]
"""(class, the case whose text model it has, how its files name that and what it sees with)"""


def test_every_class_that_sees_is_among_them():
    assert {name for name, *_ in SEEING} == {name for name in FAMILIES if "ForConditional" in name}


@pytest.mark.parametrize(("architecture", "case", "names"), SEEING)
def test_of_a_folder_that_sees_the_text_model_is_read(architecture, case, names, tmp_path):
    text, (prefixes, sees) = parity.config_of(case), names
    folder = make_model(tmp_path, text, tokenizer=False)
    model, params = load_model(folder)

    def rename(tensors):
        for name in list(tensors):
            old, new = ("model.", prefixes[0]) if name.startswith("model.") else ("lm_head.", prefixes[1])
            tensors[new + name.removeprefix(old)] = tensors.pop(name)
        tensors.update({name: np.zeros(3, "f4") for name in sees})

    rewrite(folder, rename)
    config = {
        "architectures": [architecture],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {key: value for key, value in text.items() if key != "architectures" and value is not None},
        "vision_config": {},
    }
    (folder / "config.json").write_text(json.dumps(config))
    found, found_params = load_model(folder)
    assert found == model
    equal(found_params, params)


def test_layers_of_multi_token_prediction_are_passed_over(tmp_path):
    folder = make_deepseek_v3(tmp_path, tokenizer=False)
    _, params = load_model(folder)
    beyond = DEEPSEEK_V3_TINY["num_hidden_layers"]
    rewrite(folder, lambda tensors: tensors.update({f"model.layers.{beyond}.eh_proj.weight": np.zeros((3, 3), "f4")}))
    equal(load_model(folder)[1], params)


def test_fp8_blocks_are_dequantised(tmp_path):
    """Blocks of 16 × 16, edges cut; the reference multiplies each block by its scale in numpy."""
    quantized, plain = {}, {}
    for name, tensor in random_tensors(DEEPSEEK_V3_TINY).items():
        if tensor.ndim == 1 or "embed" in name or "lm_head" in name or name.endswith("gate.weight"):
            quantized[name] = plain[name] = tensor
            continue
        blocks = tuple(-(-size // 16) for size in tensor.shape)
        scale = np.random.default_rng(0).uniform(0.5, 2.0, blocks).astype(np.float32)
        spread = scale.repeat(16, 0).repeat(16, 1)[: tensor.shape[0], : tensor.shape[1]]
        quantized[name] = (tensor / spread).astype(ml_dtypes.float8_e4m3fn)
        quantized[f"{name}_scale_inv"] = scale
        plain[name] = quantized[name].astype(np.float32) * spread
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    folder = make_model(tmp_path / "fp8", DEEPSEEK_V3_TINY | {"quantization_config": method}, tokenizer=False)
    save_file(quantized, folder / "model.safetensors", {"format": "pt"})
    reference = make_model(tmp_path / "plain", DEEPSEEK_V3_TINY, tokenizer=False)
    save_file(plain, reference / "model.safetensors", {"format": "pt"})
    equal(load_model(folder)[1], load_model(reference)[1])


def test_fp8_tensors_with_one_scale_each_are_dequantised(tmp_path, monkeypatch):
    """`weight_block_size` null and scales without an axis, as Ministral 3 has them; read in several chunks."""
    quantized, plain = {}, {}
    for name, tensor in random_tensors(QWEN3_TINY).items():
        quantized[name] = plain[name] = tensor
        if name.endswith("_proj.weight"):
            scale = np.float32(np.random.default_rng(len(name)).uniform(0.5, 2.0))
            quantized[name] = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
            quantized[f"{name}_scale_inv"], quantized[f"{name[:-7]}.activation_scale"] = (
                np.array(scale),
                np.array(scale),
            )
            plain[name] = quantized[name].astype(np.float32) * scale
    method = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    folder = make_model(tmp_path / "fp8", QWEN3_TINY | {"quantization_config": method}, tokenizer=False)
    save_file(quantized, folder / "model.safetensors", {"format": "pt"})
    reference = make_model(tmp_path / "plain", QWEN3_TINY, tokenizer=False)
    save_file(plain, reference / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(load, "CHUNK_BYTES", 3_000)
    equal(load_model(folder)[1], load_model(reference)[1])


def test_fp8_without_scales_is_refused(tmp_path):
    folder, name = make_qwen3(tmp_path, tokenizer=False), "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].astype(ml_dtypes.float8_e4m3fn)}))
    with pytest.raises(BaseModelError, match="float8_e4m3fn without"):
        load_model(folder)


def test_routers_stay_in_fp32_when_the_model_is_bf16(tmp_path):
    _, params = load_model(make_deepseek_v3(tmp_path, tokenizer=False), "bfloat16")
    assert params["moe"]["router"].dtype == params["moe"]["router_bias"].dtype == np.float32
    assert params["moe"]["gate"].dtype == params["embed"].dtype == ml_dtypes.bfloat16


def test_peak_memory_above_the_model_is_a_few_chunks(tmp_path):
    """Far below the promised one large tensor plus 1 GiB: the largest tensor here has 128 MiB, the model 0.6 GiB."""
    folder = make_qwen3(
        tmp_path, tokenizer=False, vocab_size=65536, hidden_size=512, intermediate_size=4096, num_hidden_layers=10
    )
    found = run("peak_memory.py", folder)
    assert found["peak"] - found["before"] - found["params"] < 320 * 2**20, found


def test_each_device_of_a_mesh_gets_its_own_pieces(tmp_path):
    folder = make_deepseek_v3(tmp_path, tokenizer=False, num_hidden_layers=2)
    found = run("load_on_mesh.py", folder, **xla.flags(8))
    assert found == {"equal": True, "placed": True}


def run(script: str, folder: Path, **environment: str) -> dict:
    """What a script beside this file prints, run in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_reads_only_rows_that_its_devices_hold(tmp_path, monkeypatch):
    """What a second process of fsdp=2 would do: its devices hold the later half of the hidden features."""
    folder, read = make_qwen3(tmp_path, tokenizer=False), []
    model, params = load_model(folder)
    monkeypatch.setattr(load, "CHUNK_BYTES", 3_000)

    class LaterHalf(load._Leaf):
        def __init__(self, weight, empty):
            super().__init__(weight, empty)
            for shard in self.shards:
                cut = tuple(size // 2 if dim.axis == "embed" else 0 for dim, size in self.dims(weight))
                shard.start = (*(0,) * self.lead, *cut)
                shard.shape = tuple(n - s for n, s in zip(weight.shape, shard.start, strict=True))
                shard.buffers = {d: x[tuple(map(slice, shard.start, weight.shape))] for d, x in shard.buffers.items()}

        def dims(self, weight):
            return list(zip(weight.dims, weight.shape[self.lead :], strict=True))

        def assemble(self):
            (shard,) = self.shards
            whole = params[self.weight.stack][self.weight.name] if self.weight.stack else params[self.weight.name]
            (held,) = shard.buffers.values()
            np.testing.assert_array_equal(held, whole[tuple(map(slice, shard.start, self.weight.shape))])
            return held

    monkeypatch.setattr(load, "_Leaf", LaterHalf)
    rows = tensor_files.StoredTensor.rows
    monkeypatch.setattr(
        tensor_files.StoredTensor, "rows", lambda self, *where: read.append((self.name, *where)) or rows(self, *where)
    )
    load.load_params(model, folder, "float32")
    of = [(start, stop) for name, start, stop in read if name == "model.layers.0.self_attn.o_proj.weight"]
    assert sum(stop - start for start, stop in of) < 45 and max(of)[1] == 64  # of 64 rows; chunks of 11
    assert {name for name, *_ in read} == set(load_file(folder / "model.safetensors"))


def test_fused_experts_are_those_one_by_one(tmp_path):
    """Qwen3.5 as the hub has it: gate above up in one tensor of all experts."""
    folder = make_model(tmp_path, QWEN3_5_MOE_TINY, tokenizer=False)
    _, params = load_model(folder)

    def fuse(tensors):
        for layer in range(QWEN3_5_MOE_TINY["num_hidden_layers"]):
            experts = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                np.stack([tensors.pop(f"{experts}.{e}.{name}.weight") for e in range(8)])
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            tensors[f"{experts}.gate_up_proj"], tensors[f"{experts}.down_proj"] = np.concatenate([gate, up], 1), down

    rewrite(folder, fuse)
    equal(load_model(folder)[1], params)


def test_mxfp4_experts_are_dequantised(tmp_path, monkeypatch):
    """Of the two numbers in a byte the low half comes first; 32 in a row share a power of two."""
    config = GPT_OSS_TINY | {"quantization_config": {"quant_method": "mxfp4"}, "num_hidden_layers": 1}
    folder, rng = make_model(tmp_path / "mxfp4", config, tokenizer=False), np.random.default_rng(0)
    plain = make_model(tmp_path / "plain", GPT_OSS_TINY | {"num_hidden_layers": 1}, tokenizer=False)
    grid = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    tensors, reference = (load_file(place / "model.safetensors") for place in (folder, plain))
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.{name}"
        num_experts, columns, rows = tensors.pop(key).shape
        codes = rng.integers(0, 16, (num_experts, rows, columns // 32, 32)).astype(np.uint8)
        scales = rng.integers(120, 126, (num_experts, rows, columns // 32)).astype(np.uint8)
        tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = codes[..., 0::2] | codes[..., 1::2] << 4, scales
        values = np.array([*grid, *(-x for x in grid)], np.float32)[codes] * 2.0 ** (
            scales[..., None].astype(float) - 127
        )
        matrix = values.reshape(num_experts, rows, columns).astype(np.float32)
        reference[key] = np.ascontiguousarray(matrix.transpose(0, 2, 1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(reference, plain / "model.safetensors", {"format": "pt"})
    whole = load_model(folder)[1]
    equal(whole, load_model(plain)[1])
    monkeypatch.setattr(load, "CHUNK_BYTES", 1_000)
    equal(load_model(folder)[1], whole)
