"""The engine's programs, compiled for an H100 on a machine that has none, held against budgets.

    python bench/gpu_programs.py [--list] [--only NAME,…] [--check] [--json FILE] [--dump DIR]

Wants JAX 0.12 with its CUDA plugin (Python 3.12 or newer): `pip install 'jax[cuda13]'`. Every program comes from the
tables that a server uses: a `JaxEngine` whose arrays are described instead of made (`engine/allocation.py`). The shapes
are those of Qwen3-8B (30B-A3B, gpt-oss-20B, …) at rank 32, with two layers: those that follow are like them. What a
training row computes again is what the memory plan of all 36 layers says.

What is counted, in XLA's own sequence of steps (`gpu_dump.py`): kernels of a layer; loops and branches whose turns are
data and which stand outside of CUDA graphs, each a round trip between host and device, in a layer and beside the
layers; weights that are copied out of their stack before they are used; collectives of a layer, and the largest of all;
temporaries, and what they are of the bound that the memory plan relies on (`engine/temporaries.py`, for as many
layers); bytes that a decode step touches, over those that it has to. Not what it takes: that needs the device
(`bench/gpu.py`). `bench/gpu_budgets.json` holds, for each program and count, what may not be exceeded ("budget") and
what the design aims at ("goal"). With --check the exit code is 1 where one exceeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BUDGETS = HERE / "gpu_budgets.json"
SPEC = HERE / "h100_sxm.txtpb"
FLAGS = (
    "--xla_dump_hlo_as_text",
    "--xla_gpu_experimental_cost_model_gemm_tiling_default=true",
    "--xla_gpu_deviceless_cub_mode=DEVICELESS_CUB_DISABLED",
    "--xla_gpu_cudnn_deviceless_compilation_mode=CUDNN_DEVICELESS_COMPILATION_AUTO",
)
LAYERS = 2
DEPTH = 36
LIVE_TOKENS = 512
CONTEXT = 40_960
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
}
QWEN3_30B_A3B: dict[str, Any] = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GPT_OSS_20B: dict[str, Any] = QWEN3_8B | {
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "attention_bias": True,
    "max_position_embeddings": 131_072,
}
GEMMA_3_4B: dict[str, Any] = QWEN3_8B | {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262_208,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}
QWEN3_5_9B: dict[str, Any] = QWEN3_8B | {
    "architectures": ["Qwen3_5ForCausalLM"],
    "vocab_size": 248_320,
    "full_attention_interval": 2,  # in truth every fourth: one layer of each kind
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 262_144,
}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "8b": (QWEN3_8B, DEPTH),
    "moe": (QWEN3_30B_A3B, 48),
    "gpt-oss": (GPT_OSS_20B, 24),
    "gemma3": (GEMMA_3_4B, 34),
    "qwen3.5": (QWEN3_5_9B, 32),
}
"""Shapes, and how many layers there are of them in truth."""


@dataclass(frozen=True)
class Target:
    """A program by its name here, the engine it is of, and its name there."""

    name: str
    program: str
    model: str = "8b"
    tensor: int = 1
    expert: int = 1
    fsdp: int = 1

    @property
    def engine(self) -> tuple[str, int, int, int]:
        return self.model, self.tensor, self.expert, self.fsdp


@dataclass(frozen=True)
class Figures:
    kernels_per_layer: int
    round_trips_per_layer: int
    """Loops and branches outside of CUDA graphs in a layer, nested ones once."""
    round_trips: int
    """The same beside the layers, with the loop over decode steps; without the layers' own."""
    weight_copies_per_layer: int
    collectives_per_layer: int
    collectives: int
    """The same beside the layers, in the program's loops once, of a branch the side with least."""
    temporaries_mib: float
    compile_s: float
    temporaries_over_bound: float | None = None
    """Above 1, a plan of memory could promise what a device does not have."""
    bytes_over_least: float | None = None
    """What a decode step of all DEPTH layers touches (`gpu_bytes.py`), over the bytes that it has to: weights, the
    adapters that a batch can have, keys and values of LIVE_TOKENS in each row."""
    largest_collective_mib: float | None = None
    """The most that one exchange between devices gives each of them: nothing of every slot's size."""


COUNTED = tuple(name for name in Figures.__dataclass_fields__ if name != "compile_s")


def targets() -> list[Target]:
    from tx_async.engine.platform import ACCELERATOR
    from tx_async.engine.row_shapes import row_shapes
    from tx_async.wire.worker import EngineConfig

    rows = row_shapes(EngineConfig(), CONTEXT, ACCELERATOR)
    return [
        Target("decode-1", "decode 2"),  # what a batch of one runs in: `Platform.least_decode_rows`
        *(Target(f"decode-{n}", f"decode {n}") for n in (4, 32, 128)),
        Target("decode-32-base", "decode 32 base"),
        *(Target(f"prefill-{n}", f"prefill {n}") for n in (1, 8)),
        Target("score-8", "score 8"),
        *(Target(f"train-{r}x{length}", f"forward_backward {r}x{length} K=1 rank=32") for r, length in rows),
        Target("optim-32", "optim_step rank=32"),
        Target("decode-32-tp8", "decode 32", tensor=8),
        Target("prefill-1-tp8", "prefill 1", tensor=8),
        Target("score-8-tp8", "score 8", tensor=8),
        Target("train-1x4096-tp8", "forward_backward 1x4096 K=1 rank=32", tensor=8),
        Target("train-4x512-tp8", "forward_backward 4x512 K=1 rank=32", tensor=8),
        Target("optim-32-tp8", "optim_step rank=32", tensor=8),
        Target("decode-32-fsdp8", "decode 32", fsdp=8),
        Target("train-8x4096-fsdp8", "forward_backward 8x4096 K=1 rank=32", fsdp=8),
        Target("train-32x512-fsdp8", "forward_backward 32x512 K=1 rank=32", fsdp=8),
        Target("optim-32-fsdp8", "optim_step rank=32", fsdp=8),
        Target("decode-32-moe", "decode 32", "moe"),
        Target("train-1x4096-moe", "forward_backward 1x4096 K=1 rank=32", "moe"),
        Target("decode-32-moe-ep8", "decode 32", "moe", expert=8),
        Target("train-1x4096-moe-ep8", "forward_backward 1x4096 K=1 rank=32", "moe", expert=8),
        Target("train-1x4096-gpt-oss", "forward_backward 1x4096 K=1 rank=32", "gpt-oss"),
        Target("train-4x512-gemma3", "forward_backward 4x512 K=1 rank=32", "gemma3"),
        Target("train-1x32768-qwen3.5", "forward_backward 1x32768 K=1 rank=32", "qwen3.5"),
    ]


# ---- an engine of descriptions


def engine_of(model_name: str, tensor: int, expert: int, fsdp: int) -> Any:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding
    from msgspec import structs

    from tx_async.engine import memory_plan, platform
    from tx_async.engine.allocation import described_on
    from tx_async.engine.devices import usable
    from tx_async.engine.engine import JaxEngine
    from tx_async.engine.kernels import ALL_KERNELS
    from tx_async.layers.sharding import AXES, weight_sharding
    from tx_async.models.decoder import tree_of
    from tx_async.models.load import from_config
    from tx_async.storage.store import Store
    from tx_async.wire.worker import EngineConfig

    sizes = fsdp, expert, tensor
    wanted = f"1x1x{math.prod(sizes)}"
    topology = topologies.get_topology_desc(platform="cuda", target_config=SPEC.read_text(), topology=wanted)
    mesh = Mesh(np.array(topology.devices).reshape(sizes), AXES) if math.prod(sizes) > 1 else None
    shapes, depth = MODELS[model_name]
    model = from_config(shapes)
    object.__setattr__(model, "mesh", mesh)
    alone = SingleDeviceSharding(topology.devices[0])

    def described(weight: Any) -> jax.ShapeDtypeStruct:
        sharding = weight_sharding(weight, mesh) if mesh else alone
        return jax.ShapeDtypeStruct(weight.shape, jnp.float32 if weight.wide else jnp.bfloat16, sharding=sharding)

    params = tree_of({weight: described(weight) for weight in model.weights})
    config = EngineConfig(
        kv_cache_tokens=4 * CONTEXT,
        tensor_parallel_size=tensor,
        expert_parallel_size=expert,
        fully_sharded_data_parallel_size=fsdp,
        sample_max_num_sequences=128,
        max_lora_rank=32,
    )
    planned = None
    if model_name != "moe" or expert > 1:  # the experts need more than one device
        whole = from_config(shapes | {"num_hidden_layers": depth})
        default = structs.replace(config, kv_cache_tokens=0)
        planned = memory_plan.plan(whole, default, platform.ACCELERATOR, usable("h100"))
    folder = tempfile.mkdtemp(prefix="gpu-programs-")
    return JaxEngine(
        model,
        params,
        config,
        Path(folder),
        Store(folder),
        on=platform.ACCELERATOR,
        planned=planned,
        kernels=ALL_KERNELS,
        allocate=described_on(topology.devices[0]),
    )


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Pallas asks which GPU it lowers for."""
    from jax._src.mesh import AbstractDevice, use_abstract_mesh
    from jax.sharding import AbstractMesh, AxisType

    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=gpu)):
        yield


# ---- counting


def figures_of(target: Target, engines: dict[tuple[str, int, int, int], Any], dump: Path) -> Figures:
    key = target.engine
    if key not in engines:
        engines[key] = engine_of(*key)
    program = next(program for program in engines[key].programs if program.name == target.program)
    started = time.perf_counter()
    with pretended_gpu() if math.prod(key[1:]) == 1 else nullcontext():
        lowered = program.lower()
    compiled = lowered.compile(program.options)
    seconds = time.perf_counter() - started
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    scanned = not any(isinstance(x, list) for x in engines[key].params.values())
    figures = counted(target.name, dump, temporaries, seconds, scanned, engines[key].model.num_layers)
    if bound := bound_of(engines[key], target.program):
        figures = replace(figures, temporaries_over_bound=round(temporaries * 2**20 / bound, 3))
    if target.name.startswith("decode-") and key == ("8b", 1, 1, 1):
        figures = replace(figures, bytes_over_least=bytes_over_least(engines[key], target.program, dump))
    if math.prod(key[1:]) > 1:
        figures = replace(figures, largest_collective_mib=largest_collective_mib(dump))
    return figures


def bound_of(engine: Any, program: str) -> int | None:
    """Bytes of temporaries that the memory plan expects at most; None where it relies on no bound."""
    from tx_async.engine.memory_plan import temporaries_of

    bounds = temporaries_of(engine.model, engine.config, engine.platform, engine.kernels)
    parts = engine.memory.parts if engine.memory else ()
    gathered = sum(part.num_bytes for part in parts if part.name == "gathered")
    match program.split():
        case ["forward_backward", shape, *_]:
            rows, length = map(int, shape.split("x"))
            return gathered + bounds.of_training(rows, length, engine.recompute(rows, length))
        case ["decode" | "prefill" | "score", *_]:
            return gathered + bounds.of_sampling
    return None


def bytes_over_least(engine: Any, program: str, dump: Path) -> float:
    import gpu_bytes
    import gpu_dump

    rows, pool = int(program.split()[1]), engine.sampling.pools["k"]
    keys = rows * LIVE_TOKENS * math.prod(pool.shape[2:]) * pool.dtype.itemsize
    text, shape = gpu_dump.optimized(dump), f"bf16[{','.join(map(str, pool.shape))}]"
    traced = gpu_dump.scopes(text, "_run_layers")
    within, beside = gpu_bytes.of_a_step(
        text, lambda name: name in traced, lambda type_: keys if type_.startswith(shape) else None
    )
    adapters = {} if program.endswith(" base") else engine.samplers.weights
    num_slots = len(engine.samplers.scale)
    of_adapters = {name: _bytes(x) * min(rows, num_slots) // num_slots for name, x in adapters.items()}
    stacks = [stack.name for stack in engine.model.stacks]
    least_within = 2 * LAYERS * keys + sum(_bytes(engine.params[x]) + of_adapters.get(x, 0) for x in stacks)
    least_beside = _bytes((engine.params["norm"], engine.params["head"])) + of_adapters.get("head", 0)
    layers = DEPTH / LAYERS
    return round((layers * within + beside) / (layers * least_within + least_beside), 3)


def largest_collective_mib(dump: Path) -> float:
    import gpu_bytes
    import gpu_dump

    return round(gpu_bytes.largest_collective(gpu_dump.optimized(dump)) / 2**20, 1)


def _bytes(tree: Any) -> int:
    import jax

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def counted(
    name: str, dump: Path, temporaries_mib: float, seconds: float, scanned: bool = True, num_layers: int = LAYERS
) -> Figures:
    """scanned: the layers are a loop."""
    import gpu_dump

    program = gpu_dump.thunks(dump)
    step = (gpu_dump.loops(program) or [program])[0] if name.startswith("decode-") else program
    loops = gpu_dump.loops(step)[: 2 if name.startswith("train-") else 1]
    # A loop over the layers holds most of a program. Of training, forward and backward pass have one each. Where the
    # layers are a list their kernels are known by name, and whatever asks the host is counted beside them.
    is_scan = scanned and not name.startswith(("score-", "optim-"))
    layers, number = (loops, 1) if is_scan else ([step], num_layers)
    inside = sum(loop.round_trips for loop in layers) if is_scan else 0
    kernels, collectives = (
        (sum(loop.kernels for loop in layers), sum(loop.collectives for loop in layers))
        if is_scan
        else (gpu_dump.steps_of(dump, "_run_layers", kind) for kind in (gpu_dump.is_work, gpu_dump.is_collective))
    )
    # Weights in a list are no stack; the loop that is left goes over the head's chunks, and slices positions.
    chunked = 0 if is_scan else sum(loop.weight_copies for loop in gpu_dump.loops(step))
    return Figures(
        kernels_per_layer=kernels // number,
        round_trips_per_layer=inside,
        round_trips=program.round_trips - inside - len(layers) * is_scan,
        weight_copies_per_layer=(sum(loop.weight_copies for loop in layers) - chunked) // number,
        collectives_per_layer=collectives // number,
        collectives=program.collectives - collectives,
        temporaries_mib=round(temporaries_mib, 1),
        compile_s=round(seconds, 1),
    )


def move_dumps(source: Path, target: Path) -> None:
    """XLA writes every program of this process into one folder: what was there was this one's."""
    target.mkdir(parents=True, exist_ok=True)
    for path in list(source.iterdir()):
        if path.is_file():
            shutil.move(str(path), target / path.name)


# ---- budgets


def exceeded(name: str, figures: dict[str, Any], budgets: dict[str, Any]) -> Iterator[str]:
    for count, limit in budgets.get(name, {}).get("budget", {}).items():
        if figures[count] > limit:
            yield f"{name}: {count} is {figures[count]}, budget {limit}"


def missed(name: str, figures: dict[str, Any], budgets: dict[str, Any]) -> Iterator[str]:
    goals = budgets.get(name, {}).get("goal", {})
    return (f"{count} {figures[count]} (goal {goal})" for count, goal in goals.items() if figures[count] > goal)


def line(name: str, figures: Figures, budgets: dict[str, Any]) -> str:
    known = {count: value for count, value in asdict(figures).items() if value is not None}
    counts = "  ".join(f"{count.removesuffix('_per_layer')} {value}" for count, value in known.items())
    behind = "; ".join(missed(name, asdict(figures), budgets))
    return f"{name:<18} {counts}" + (f"\n{'':<18} not yet: {behind}" if behind else "")


# ---- the command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the programs' names and end")
    parser.add_argument("--only", default="", help="names, with commas between")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a budget is exceeded")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--dump", type=Path, help="keep XLA's files of each program in a folder of its name here")
    parser.add_argument("--seconds", type=float, default=1140, help="after so long no other program is begun")
    jobs = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="programs that are compiled at a time")
    return parser.parse_args(arguments)


def chosen(only: str) -> list[Target]:
    known = {target.name: target for target in targets()}
    names = [name for name in only.split(",") if name] or list(known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown: {', '.join(unknown)}; see --list")
    return [known[name] for name in names]


def use_deviceless_jax(dump: Path) -> None:
    """Before JAX is imported: flags, and a CPU for whatever runs."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["XLA_FLAGS"] = " ".join((f"--xla_dump_to={dump}", *FLAGS, os.environ.get("XLA_FLAGS", "")))


class Compiling:
    """One process of those that compile: its engines, and the folder into which XLA writes."""

    current: Compiling

    def __init__(self, parent: Path):
        self.dump = Path(tempfile.mkdtemp(dir=parent))
        self.engines: dict[tuple[str, int, int, int], Any] = {}
        use_deviceless_jax(self.dump)

    @classmethod
    def begin(cls, parent: Path) -> None:
        cls.current = cls(parent)

    @classmethod
    def run(cls, target: Target, keep: Path | None, deadline: float) -> Figures | None:
        """None: the time was over before it began."""
        return cls.current._run(target, keep) if time.time() < deadline else None

    def _run(self, target: Target, keep: Path | None) -> Figures:
        if target.engine not in self.engines:
            self.engines[target.engine] = engine_of(*target.engine)
        shutil.rmtree(self.dump, ignore_errors=True)
        self.dump.mkdir()
        figures = figures_of(target, self.engines, self.dump)
        if keep:
            move_dumps(self.dump, keep / target.name)
        return figures


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(target.name for target in targets()))
        return 0
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    wanted = chosen(options.only)
    with tempfile.TemporaryDirectory(prefix="gpu-dump-", ignore_cleanup_errors=True) as work:
        found, over = measure(wanted, options, Path(work), budgets)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(f"OVER BUDGET {text}" for text in over) or "within the budgets")
    return 1 if options.check and over else 0


def measure(
    wanted: list[Target], options: argparse.Namespace, work: Path, budgets: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    over: list[str] = []
    deadline = time.time() + options.seconds
    # Processes of their own: XLA's flags, with the folder that it writes into, hold for a whole process.
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), Compiling.begin, (work,)) as pool:
        running = [pool.submit(Compiling.run, target, options.dump, deadline) for target in wanted]
        for target, future in zip(wanted, running, strict=True):
            if (figures := future.result()) is None:
                print(f"{target.name:<18} skipped: {options.seconds:.0f} s are over", flush=True)
                continue
            found[target.name] = asdict(figures)
            over += exceeded(target.name, found[target.name], budgets)
            print(line(target.name, figures, budgets), flush=True)
    return found, over


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main())
