"""What is compiled before the first request: few programs, the likeliest, of every kind."""

from tx_async.engine.ahead import AHEAD_MAX, SHARES, is_rare, likeliest

LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 40_960)
NAMES = [
    *(
        f"{kind} {max(1, 2048 // n)}x{n} K={k} rank={rank}"
        for n in LENGTHS
        for k in (1, 8, 32, 128)
        for rank in (8, 32)
        for kind in ("forward", "forward_backward")
    ),
    "optim_step rank=8",
    "optim_step rank=32",
    "create_adapter",
    *(f"decode {n}{base}" for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) for base in ("", " base")),
    *(f"{kind} {n}" for kind in ("prefill", "score") for n in (4, 16, 64)),
    "copy pages",
]


def test_at_most_24_programs_of_every_kind_are_compiled_ahead():
    chosen = likeliest(NAMES)
    assert sum(share for _, share in SHARES) == AHEAD_MAX == len(chosen) == len(set(chosen))
    assert set(chosen) <= set(NAMES)
    assert all(any(name.startswith(kind) for name in chosen) for kind, _ in SHARES)


def test_of_training_the_shortest_rows_with_one_target_at_the_highest_rank():
    training = [name for name in likeliest(NAMES) if name.startswith("forward")]
    assert training == [
        "forward_backward 4x512 K=1 rank=32",
        "forward_backward 2x1024 K=1 rank=32",
        "forward_backward 1x2048 K=1 rank=32",
        "forward_backward 1x4096 K=1 rank=32",
        "forward_backward 1x8192 K=1 rank=32",
    ]
    assert "optim_step rank=32" in likeliest(NAMES)


def test_an_engine_with_few_programs_compiles_what_it_has():
    assert likeliest(["decode 4", "copy pages"]) == ["decode 4"]


def test_what_few_ever_ask_for_waits_until_somebody_does():
    rare = ["decode 8 wide", "decode 8 base wide", "forward_backward 4x64 K=4097 rank=8", "forward 4x64 K=1024 rank=8"]
    assert all(map(is_rare, rare)) and not any(map(is_rare, NAMES))
