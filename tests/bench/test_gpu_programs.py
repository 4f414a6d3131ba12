"""GPU programs without a GPU: the list, how XLA's dump is counted, and budgets that can be exceeded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_bytes  # noqa: E402
import gpu_dump  # noqa: E402
import gpu_programs  # noqa: E402

DUMP = """\
000: kCommandBuffer [source       | next=009 (1)]
    001: kCustomKernel [source | sink] fusion_1 grid: [1, 1, 1]
    002: kCopy         [source | sink] kCopy
009: kWhile         [prev=000 (1) | sink        ]
condition:
    010: kCustomKernel [source       | next=011 (1)] compare
  body:
    000: kCommandBuffer [source       | next=018 (1)]
        012: kCustomKernel [source       | next=013 (1)] fusion_2
        013: kWhile        [source       | next=014 (1)] in a graph
            014: kCustomKernel [source       | next=013 (1)] fusion_3
    018: kWhile         [prev=000 (1) | next=202 (1)]
condition:
        019: kCustomKernel [source | sink] compare_2
      body:
        020: kAsyncStart   [source        | next=061 (17)] stream=computation_stream[0], async_id=20
            022: kDynamicSliceFusion [source | sink] params=1, results=1
                021: kCopy [source | sink] kCopy
        023: kDynamicSliceFusion [source | sink] params=1, results=1
            024: kGemm [source | sink] in place
        096: kConditional  [prev=061 (4)  | next=100 (4) ]
          false_branch:
            000: kCommandBuffer [source | sink]
                065: kCustomKernel [source       | next=066 (1)] fusion_4
                066: kAllGather [source | sink] for those who want it
          true_branch:
            080: kWhile        [prev=079 (1) | sink        ]
condition:
                081: kCustomKernel [source | sink] compare_3
              body:
                082: kCustomKernel [source | sink] fusion_5
        097: kAllReduceStart [source | sink]
        098: kAllReduceDone [source | sink]
"""


def test_a_dump_is_counted_as_the_host_would_feel_it():
    program = gpu_dump.read(DUMP)
    (step,) = gpu_dump.loops(program)
    layer = gpu_dump.loops(step)[0]
    assert (program.kernels, program.launches, program.round_trips) == (11, 9, 4)
    assert (layer.kernels, layer.round_trips, layer.weight_copies, layer.collectives) == (6, 2, 1, 1)


def test_layers_and_what_is_beside_them_are_counted_apart(tmp_path):
    (tmp_path / "module.thunk_sequence.txt").write_text(DUMP)
    figures = gpu_programs.counted("decode-4", tmp_path, 1.0, 2.0)
    assert (figures.kernels_per_layer, figures.round_trips_per_layer, figures.round_trips) == (6, 2, 1)
    assert figures.weight_copies_per_layer == figures.collectives_per_layer == 1


def test_kernels_of_unrolled_layers_are_known_by_what_they_were_made_from(tmp_path):
    """Among them one that the compiler added for a product, and that nothing traced. Constants belong to nobody."""
    hlo = """\
%wrapped_transpose_computation (p: f32[2]) -> f32[2] {
  ROOT %transpose.1 = f32[2] transpose(%p), dimensions={0}
}
%fused_computation.1 (p: f32[2]) -> f32[2] {
  ROOT %add.1 = f32[2] add(%p, %p), metadata={op_name="jit(decode)/while/body/jit(_run_layers)/add"}
}
%fused_computation.2 (p: f32[2]) -> f32[2] {
  %constant.1 = f32[] constant(0), metadata={op_name="jit(decode)/while/body/jit(_run_layers)/shard_map"}
  ROOT %reduce.1 = f32[2] maximum(%p, %constant.1), metadata={op_name="jit(decode)/while/body/reduce"}
}
ENTRY %main (x: f32[2]) -> f32[2] {
  %reduce_fusion.1 = f32[2] fusion(%x), kind=kInput, calls=%fused_computation.2
  %loop_fusion.1 = f32[2] fusion(%x), kind=kLoop, calls=%fused_computation.1
  %wrapped_transpose.1 = f32[2] fusion(%x), kind=kInput, calls=%wrapped_transpose_computation
  %wrapped_transpose.2 = f32[2] fusion(%x), kind=kInput, calls=%wrapped_transpose_computation
  %bitcast.1 = f32[2] bitcast(%wrapped_transpose.1)
  %gemm.1 = f32[2] dot(%bitcast.1, %x), metadata={op_name="jit(decode)/while/body/transpose(jvp(jit(_run_layers)))/dot"}
  %psum.1 = f32[2] fusion(%gemm.1), kind=kCustom, metadata={op_name="jit(decode)/jit(_run_layers)/shard_map/psum"}
  ROOT %head.1 = f32[2] dot(%wrapped_transpose.2, %x), metadata={op_name="jit(decode)/dot"}
}
"""
    thunk = 'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{}"\n  }}\n  thunk_kind: "{}"\n}}\n'
    thunks = [("loop_fusion.1", "kCustomKernel"), ("gemm.1", "kGemm"), ("head.1", "kGemm"), ("gemm.1", "kSequential")]
    thunks += [("psum.1", "kCollectiveKernel"), ("wrapped_transpose.1", "kCustomKernel")]
    thunks += [("wrapped_transpose.2", "kCustomKernel"), ("reduce_fusion.1", "kCustomKernel")]
    (tmp_path / "m.gpu_after_optimizations.txt").write_text(hlo)
    (tmp_path / "m.thunk_metadata.txt").write_text("".join(thunk.format(*one) for one in thunks))
    assert gpu_dump.steps_of(tmp_path, "_run_layers", gpu_dump.is_work) == 3
    assert gpu_dump.steps_of(tmp_path, "_run_layers", gpu_dump.is_collective) == 1


def test_a_weight_that_is_gathered_belongs_to_the_layer_that_needs_it(tmp_path):
    """The compiler names the exchange, and what starts and ends it, after the weight; that of the head is beside."""
    hlo = """\
%async_computation.1 (p: f32[1,2]) -> f32[2,2] {
  ROOT %all-gather.1 = f32[2,2] all-gather(%p), dimensions={0}, metadata={op_name="params[\\'layers\\'][0][\\'q\\']"}
}
%async_computation.2 (p: f32[1,2]) -> f32[2,2] {
  ROOT %all-gather.2 = f32[2,2] all-gather(%p), dimensions={0}, metadata={op_name="params[\\'head\\']"}
}
ENTRY %main (x: f32[1,2], y: f32[1,2]) -> f32[2,2] {
  %all-gather-start = (f32[1,2], f32[2,2]) async-start(%x), calls=%async_computation.1, metadata={op_name="params[]"}
  %all-gather-start.1 = (f32[1,2], f32[2,2]) async-start(%y), calls=%async_computation.2, metadata={op_name="params[]"}
  %all-gather-done = f32[2,2] async-done(%all-gather-start), metadata={op_name="params[]"}
  %all-gather-done.1 = f32[2,2] async-done(%all-gather-start.1), metadata={op_name="params[]"}
  %gemm.1 = f32[2,2] dot(%all-gather-done, %x), metadata={op_name="jit(train)/jvp(jit(_run_layers))/dot"}
  ROOT %gemm.2 = f32[2,2] dot(%gemm.1, %all-gather-done.1), metadata={op_name="jit(train)/dot"}
}
"""
    assert gpu_dump.scopes(hlo, "_run_layers") == {"all-gather-start", "all-gather-done", "all-gather.1", "gemm.1"}


STEP = """\
%write (pool: f32[100,4], keys: f32[2,4], at: s32[]) -> f32[100,4] {
  %pool = f32[100,4]{1,0} parameter(0)
  %keys = f32[2,4]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %update = f32[100,4]{1,0} dynamic-update-slice(%pool, %keys, %at, %at)
}
%rows (table: f32[1000,4], tokens: s32[2]) -> f32[2,4] {
  %table = f32[1000,4]{1,0} parameter(0)
  %tokens = s32[2]{0} parameter(1)
  ROOT %gather = f32[2,4]{1,0} gather(%table, %tokens), offset_dims={1}
}
%cheap (a: f32[2,4]) -> f32[2,4] {
  ROOT %a = f32[2,4]{1,0} parameter(0)
}
%dear (b: f32[2,4]) -> f32[2,4] {
  %b = f32[2,4]{1,0} parameter(0)
  ROOT %sort = f32[2,4]{1,0} sort(%b), dimensions={1}
}
%pass (state: (f32[2,4])) -> (f32[2,4]) {
  %state = (f32[2,4]{1,0}) parameter(0)
  %negate = f32[2,4]{1,0} negate(%state#0)
  ROOT %next = (f32[2,4]{1,0}) tuple(%negate)
}
%step (all: (f32[1000,4], f32[100,4], s32[2], s32[])) -> (f32[1000,4], f32[100,4], s32[2], s32[]) {
  %all = (f32[1000,4]{1,0}, f32[100,4]{1,0}, s32[2]{0}, /*index=3*/s32[]) parameter(0)
  %x = f32[2,4]{1,0} fusion(%all#0, %all#2), kind=kLoop, calls=%rows, metadata={op_name="jit(f)/embed"}
  %new = f32[100,4]{1,0} fusion(%all#1, %x, %all#3), kind=kLoop, calls=%write, metadata={op_name="jit(_run_layers)/w"}
  %out = f32[2,4]{1,0} custom-call(%x, %new), metadata={op_name="jit(_run_layers)/paged_attention/pallas_call"}
  %which = f32[2,4]{1,0} conditional(%all#3, %out, %out), branch_computations={%cheap, %dear}
  %start = (f32[2,4]{1,0}) tuple(%which)
  %loop = (f32[2,4]{1,0}) while(%start), condition=%c, body=%pass, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %result = (f32[1000,4]{1,0}, f32[100,4]{1,0}, s32[2]{0}, s32[]) tuple(%all#0, %new, %all#2, %all#3)
}
ENTRY %main (a: (f32[1000,4], f32[100,4], s32[2], s32[])) -> (f32[1000,4], f32[100,4], s32[2], s32[]) {
  %a = (f32[1000,4]{1,0}, f32[100,4]{1,0}, s32[2]{0}, s32[]) parameter(0)
  ROOT %steps = (f32[1000,4]{1,0}, f32[100,4]{1,0}, s32[2]{0}, s32[]) while(%a), condition=%c, body=%step
}
"""


def test_of_what_a_kernel_takes_pieces_of_the_pieces_are_counted():
    """Rows of a table, a write in place, the live part of a pool, the cheapest branch, and each turn of a loop."""
    pool = 160
    within, beside = gpu_bytes.of_a_step(
        STEP, lambda name: False, lambda type_: pool if type_.startswith("f32[100,4]") else None
    )
    write, attention = 32 + 4 + 32, 32 + pool + 32
    assert within == write + attention
    assert beside == (32 + 8 + 32) + 3 * (32 + 32)


def test_the_largest_exchange_is_found_wherever_it_stands():
    hlo = """\
%async (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %sum = f32[4]{0} all-reduce(%x), to_apply=%add
}
ENTRY %main (x: f32[4]) -> bf16[4,8] {
  %both = (f32[4]{0}, f32[2]{0}) all-gather(%x, %x), dimensions={0}
  ROOT %large = bf16[4,8]{1,0} broadcast(%x), dimensions={0}
}
"""
    assert gpu_bytes.largest_collective(hlo) == 4 * 6


def test_a_budget_that_is_exceeded_says_which_and_a_goal_that_is_missed_is_only_told():
    figures = {"round_trips": 4, "temporaries_mib": 10.0}
    budgets = {"decode-4": {"budget": {"round_trips": 3, "temporaries_mib": 10}, "goal": {"temporaries_mib": 5}}}
    assert list(gpu_programs.exceeded("decode-4", figures, budgets)) == ["decode-4: round_trips is 4, budget 3"]
    assert list(gpu_programs.missed("decode-4", figures, budgets)) == ["temporaries_mib 10.0 (goal 5)"]
    assert not list(gpu_programs.exceeded("decode-8", figures, budgets))


def test_the_list_names_every_program_once_without_blanks():
    listed = subprocess.run(
        [sys.executable, "bench/gpu_programs.py", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listed) == len(set(listed)) > 15
    kinds = ("decode-", "prefill-", "score-", "train-", "optim-")
    assert all(name.startswith(kinds) and " " not in name for name in listed)
    assert {kind for kind in kinds for name in listed if name.startswith(kind)} == set(kinds)


def test_a_name_that_is_not_on_the_list_is_refused():
    with pytest.raises(SystemExit, match="decode-7"):
        gpu_programs.chosen("decode-4,decode-7")


def test_the_table_of_budgets_is_of_known_programs_and_counts():
    budgets = json.loads(gpu_programs.BUDGETS.read_text())
    assert set(budgets) <= {target.name for target in gpu_programs.targets()}
    counts = {count for limits in budgets.values() for table in limits.values() for count in table}
    assert counts <= set(gpu_programs.COUNTED)


def test_programs_of_every_kind_are_held_against_the_bound_of_the_memory_plan():
    budgets = json.loads(gpu_programs.BUDGETS.read_text())
    held = {name for name, tables in budgets.items() if tables.get("budget", {}).get("temporaries_over_bound") == 1}
    assert {"decode-128", "prefill-1", "train-4x512", "train-1x40960", "train-1x4096-moe-ep8"} <= held
    assert {"train-4x512-gemma3", "train-1x32768-qwen3.5"} <= held, "whose bounds were too low"
