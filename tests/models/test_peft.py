"""Adapters leave as ordinary PEFT adapters and come back; PEFT computes the same logits and gradients with them."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support import parity
from tx_async.errors import InvalidRequest
from tx_async.models.load import from_config, load_model
from tx_async.models.peft import adapter_shapes, from_peft, to_peft
from tx_async.testing.models import make_model
from tx_async.wire.worker import LORA_ALPHA, AdapterConfig

CONFIG = AdapterConfig(rank=4)
families = pytest.mark.parametrize("case", parity.FAMILIES, ids=lambda case: case.name)


def of_family(name: str):
    return from_config(next(case.config for case in parity.CASES if case.name == name))


@families
def test_an_exported_adapter_imports_as_it_was(case):
    model = from_config(case.config)
    adapter = parity.random_adapter(model, CONFIG)
    imported, config = from_peft(model, *to_peft(model, adapter, CONFIG))
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, imported, adapter)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_modules_named_as_in_a_folder_that_sees_are_the_text_models(prefix):
    model = of_family("qwen3_5")
    adapter = parity.random_adapter(model, CONFIG)
    tensors, settings = to_peft(model, adapter, CONFIG)
    renamed = {name.replace(".model.model.layers.", f".model.{prefix}layers."): x for name, x in tensors.items()}
    assert renamed.keys() != tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, from_peft(model, renamed, settings)[0], adapter)


def test_the_experts_of_gpt_oss_leave_as_two_parameters_a_layer():
    model, config = of_family("gpt_oss"), AdapterConfig(rank=2, train_attn=False, train_unembed=False)
    tensors, settings = to_peft(model, parity.random_adapter(model, config), config)
    experts = "base_model.model.model.layers.0.mlp.experts"
    shapes = {name: tensor.shape for name, tensor in tensors.items() if ".layers.0." in name}
    assert shapes == {
        f"{experts}.base_layer.lora_A.weight": (8 * 4, 64),
        f"{experts}.base_layer.lora_B.weight": (2 * 32, 8 * 4),
        f"{experts}.lora_A.weight": (8 * 2, 32),
        f"{experts}.lora_B.weight": (64, 8 * 2),
    }
    assert settings["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert settings["target_modules"] == [] and settings["rank_pattern"] == {"mlp.experts.gate_up_proj": 4}


def test_experts_that_peft_has_no_names_for_leave_one_by_one_and_nothing_as_a_parameter():
    """vLLM reads Qwen3.5's experts so. PEFT dies of parameters beside modules, and the archive says what it ignores."""
    model = of_family("qwen3_5_moe")
    tensors, settings = to_peft(model, parity.random_adapter(model, CONFIG), CONFIG)
    assert "target_parameters" not in settings and "gate_proj" in settings["target_modules"]
    mlp = {name.split(".mlp.")[1].split(".lora_")[0] for name in tensors if ".layers.0.mlp." in name}
    modules = [*(f"experts.{e}" for e in range(8)), "shared_expert"]
    assert mlp == {f"{module}.{leaf}_proj" for module in modules for leaf in ("gate", "up", "down")}


def test_groups_that_a_loader_fuses_leave_whole():
    """vLLM dies of half a group."""
    model, config = of_family("qwen3_5"), AdapterConfig(rank=2, train_mlp=False, train_unembed=False)
    tensors, _ = to_peft(model, parity.random_adapter(model, config), config)
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors if "linear_attn" in name}
    assert modules == {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}


def test_untrained_groups_are_neither_exported_nor_imported():
    model, config = of_family("qwen3"), AdapterConfig(rank=2, train_mlp=False, train_unembed=False)
    tensors, peft_config = to_peft(model, parity.random_adapter(model, config), config)
    assert peft_config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert all("self_attn" in name for name in tensors)
    imported, found = from_peft(model, tensors, peft_config)
    assert found == config and set(imported["layers"]) == {"q", "k", "v", "o"} and imported["head"] == {}
    assert adapter_shapes(model, config)["layers"]["q"] == ((2, 64, 2), (2, 2, 64))


def test_ranks_and_alphas_of_patterns_and_rslora_are_folded_into_b():
    """Two modules of different rank and alpha: the product (x A) B · 32 / rank must be PEFT's for each."""
    model, rng = of_family("qwen3"), np.random.default_rng(0)
    ranks = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.q_proj": 4}
    tensors = {}
    for module, rank in ranks.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((rank, 64), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((64, rank), np.float32)
    settings = {"r": 2, "lora_alpha": 8, "use_rslora": True, "peft_type": "LORA"}
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 4}, "alpha_pattern": {"1.self_attn.q_proj": 6}}
    weights, config = from_peft(model, tensors, settings | patterns)
    assert config == AdapterConfig(rank=4, train_mlp=False, train_unembed=False)
    a, b = weights["layers"]["q"]
    for layer, scale in enumerate((8 / 2**0.5, 6 / 4**0.5)):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"] * scale
        np.testing.assert_allclose((a[layer] @ b[layer]).T * LORA_ALPHA / config.rank, product, rtol=1e-5, atol=1e-5)
    assert not weights["layers"]["k"][1].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all'"),
    ],
)
def test_adapters_with_features_that_have_no_counterpart_are_refused(settings, message):
    model = of_family("qwen3")
    tensors, config = to_peft(model, parity.random_adapter(model, CONFIG), CONFIG)
    with pytest.raises(InvalidRequest, match=message):
        from_peft(model, tensors, config | settings)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.9.self_attn.q_proj.lora_A.weight", np.zeros((4, 64)), "only half of model.layers.9"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", np.zeros((4, 63)), "belongs to another model"),
        ("model.layers.0.self_attn.q_proj.weight", np.zeros((4, 64)), "is not a LoRA weight"),
    ],
)
def test_adapters_of_another_model_are_refused_by_name(name, tensor, message):
    model = of_family("qwen3")
    tensors, config = to_peft(model, parity.random_adapter(model, CONFIG), CONFIG)
    with pytest.raises(InvalidRequest, match=message):
        from_peft(model, tensors | {f"base_model.model.{name}": tensor}, config)


@pytest.mark.torch
@families
def test_peft_computes_the_same_logits_and_gradients_with_an_exported_adapter(case, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    folder, tokens = make_model(tmp_path, case.config, tokenizer=False), parity.tokens_of(case, 0, rows=2)
    model, params = load_model(folder)
    adapter = parity.random_adapter(model, CONFIG)
    save_peft(tmp_path / "adapter", *to_peft(model, adapter, CONFIG))
    directions = np.random.default_rng(1).standard_normal((*tokens.shape, model.vocab_size)).astype(np.float32)

    with warnings.catch_warnings(action="ignore"):  # PEFT has opinions about tied heads
        reference = peft.PeftModel.from_pretrained(
            parity.reference_model(folder), tmp_path / "adapter", is_trainable=True
        ).eval()
    theirs = reference(torch.tensor(tokens)).logits
    (theirs * torch.tensor(directions)).sum().backward()

    lora = parity.rows_of(adapter, CONFIG, rows=2)
    ours, gradients = jax.jit(jax.value_and_grad(loss, argnums=2, has_aux=True), static_argnums=0)(
        model, params, lora, tokens, directions
    )
    assert parity.relative_error(ours[1], theirs.detach().numpy()) < 2e-5

    summed = jax.tree.map(lambda g: np.asarray(g).sum(1), gradients.weights)
    expected, settings = peft_gradients(reference, tmp_path / "resaved")
    imported, config = from_peft(model, expected, settings)
    assert config.rank == CONFIG.rank
    for found, wanted in zip(jax.tree.leaves(summed), jax.tree.leaves(imported), strict=True):
        assert parity.relative_error(found, wanted) < 5e-5


def loss(model, params, lora, tokens, directions):
    logits = parity.logits(model, params, tokens, lora)
    return (logits * directions).sum(), logits


def save_peft(folder: Path, tensors: dict[str, np.ndarray], config: dict) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peft_gradients(reference, folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Gradients in the places of weights, saved by PEFT itself: so `from_peft` takes fused experts apart."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
        keep_own_blocks(reference)
        reference.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), settings


def keep_own_blocks(reference) -> None:
    """In a fused gate_up_proj, B also has a gradient between gate's A and up's output: no such weight exists here."""
    for name, parameter in reference.named_parameters():
        if name.endswith("experts.base_layer.lora_B.default.weight"):
            parity.keep_own_blocks(parameter, reference.config.model_type == "gpt_oss")


@pytest.mark.torch
@families
def test_an_adapter_made_by_peft_imports_and_gives_its_logits(case, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    folder, tokens = make_model(tmp_path, case.config, tokenizer=False), parity.tokens_of(case, 0)
    names = {"q_proj", "kv_b_proj", "o_proj", "down_proj", "gate_proj", "up_proj"}
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=sorted(names), init_lora_weights=False)
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        reference = peft.get_peft_model(parity.reference_model(folder), settings).eval()
        reference.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens)).logits.numpy()
    model, params = load_model(folder)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    adapter, config = from_peft(model, tensors, json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()))
    assert not config.train_unembed
    ours = jax.jit(parity.logits, static_argnums=0)(
        model, params, jnp.asarray(tokens), parity.rows_of(adapter, config, 1)
    )
    assert parity.relative_error(ours, theirs) < 2e-5
