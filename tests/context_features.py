"""What every scheme must do: one line per feature, for gloo here and, in longer batches, for NCCL on GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from context_cases import ContextCase
from oracle import Terms

#: Schemes, each on four ranks.
SCHEMES: dict[str, dict[str, Any]] = {
    "p2p": {"comm": "p2p", "ranks": 4},
    "all_gather": {"comm": "all_gather", "ranks": 4},
    "a2a": {"comm": "a2a", "ranks": 4},
    "a2a+p2p": {"comm": "a2a+p2p", "ranks": (2, 2)},
}
CROSS = {"lengths": (9, 0, 1, 20, 11, 6), "keys": (30, 3, 1, 20, 5, 0)}

FEATURES: dict[str, dict[str, Any]] = {
    # masks
    "causal": {},
    "full": {"terms": Terms()},
    "top_left": {"terms": Terms(causal="top_left")},
    "window": {"terms": Terms(window=(5, 3))},
    "window_wide": {"terms": Terms(window=(30, 12))},
    "window_left": {"terms": Terms(window=(6, None))},
    "window_right": {"terms": Terms(window=(None, 4))},
    "window_self": {"terms": Terms(window=(0, 0))},
    "window_right_zero": {"terms": Terms(window=(None, 0))},
    "causal_window": {"terms": Terms(causal=True, window=(7, 9))},
    "causal_window_wide": {"terms": Terms(causal=True, window=(25, None))},
    # terms of the scores
    "scale": {"terms": Terms(causal=True, scale=0.3)},
    "scale_negative": {"terms": Terms(causal=True, scale=-0.4)},
    "softcap": {"terms": Terms(causal=True, softcap=1.5)},
    "softcap_full": {"terms": Terms(softcap=1.5)},
    "sink": {"scores": "sink"},
    "sink_low": {"scores": "sink_low", "dtype": "bfloat16"},
    "sink_full": {"terms": Terms(), "scores": "sink"},
    "sink_softcap_window": {"terms": Terms(window=(6, 2), softcap=2.0), "scores": "sink"},
    "alibi": {"scores": "alibi"},
    "alibi_sequences": {"scores": "alibi_sequences"},
    "alibi_sink": {"scores": "alibi sink"},
    "alibi_window": {"terms": Terms(causal=True, window=(9, None)), "scores": "alibi"},
    "alibi_full": {"terms": Terms(), "scores": "alibi"},
    "alibi_window_full": {"terms": Terms(window=(8, 5)), "scores": "alibi"},
    "alibi_zigzag": {"scores": "alibi", "placement": "zigzag"},
    # heads and dims
    "mha": {"heads": "4/4"},
    "mqa": {"heads": "4/1"},
    "fewer_kv_heads_than_ranks": {"heads": "8/2"},
    "kv_heads_that_ranks_do_not_divide": {"heads": "12/3"},
    "kv_heads_that_straddle_ranks": {"heads": "12/6", "scores": "sink"},
    "heads_that_ranks_do_not_divide": {"heads": "6/3"},
    "wide_keys": {"dims": "24/16"},
    "wide_values": {"dims": "8/20"},
    "odd_dims": {"dims": "5/3", "dtype": "float32"},
    # dtypes and what is asked
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "without_lse": {"asks": "grad"},
    "forward": {"asks": "forward"},
    "out_alone": {"asks": "out"},
    "deterministic": {"asks": "deterministic"},
    "plan_told_nothing": {"told": False, "scores": "sink"},
    # forms
    "padded": {"gap": 8},
    "padded_full": {"gap": 8, "terms": Terms()},
    "offset_and_tail": {"first": 3, "gap": 4, "tail": 5},
    "sanitized": {"gap": 8, "garbage": float("nan")},
    "sanitized_full_sink": {"gap": 8, "garbage": float("nan"), "terms": Terms(), "scores": "sink"},
    "plain_length": {"lengths": 41},
    "plain_length_window": {"lengths": 41, "terms": Terms(window=(6, 1))},
    "batch": {"lengths": 26, "batch": 3},
    "batch_full_sink": {"lengths": 19, "batch": 2, "terms": Terms(), "scores": "sink"},
    "batch_alibi_sequences": {"lengths": 19, "batch": 2, "scores": "alibi_sequences"},
    "even": {"lengths": 48, "batch": 2, "scores": "sink"},
    "even_full": {"lengths": 48, "terms": Terms(softcap=1.5)},
    "even_window": {"lengths": 48, "batch": 2, "terms": Terms(causal=True, window=(7, None))},
    "even_alibi_sequences": {"lengths": 48, "batch": 2, "scores": "alibi_sequences"},
    "even_contiguous": {"lengths": 48, "batch": 3, "placement": "contiguous", "heads": "8/2", "dims": "24/16"},
    "bias": {"lengths": 22, "batch": 2, "scores": "bias"},
    "bias_row": {"lengths": 22, "batch": 2, "scores": "bias_row", "terms": Terms()},
    "bias_alibi_sequences": {"lengths": 22, "batch": 2, "scores": "alibi_sequences bias"},
    "bias_packed": {"scores": "bias"},
    "mask": {"lengths": 22, "batch": 2, "scores": "mask", "terms": Terms()},
    "mask_sink_zigzag": {"lengths": 23, "scores": "mask sink", "placement": "zigzag"},
    "bias_told_nothing": {"lengths": 22, "scores": "bias", "told": False},
    # lengths and placement
    "no_sequence": {"lengths": ()},
    "no_token": {"lengths": (0, 0)},
    "no_token_full": {"lengths": (0, 0), "terms": Terms(), "scores": "sink"},
    "one_token": {"lengths": (1,)},
    "fewer_tokens_than_ranks": {"lengths": (2,), "terms": Terms()},
    "a_rank_with_nothing": {"lengths": (0, 3, 0), "scores": "sink"},
    "plain_length_zero": {"lengths": 0},
    "batch_zero": {"lengths": 9, "batch": 0},
    "one_long": {"lengths": (101,)},
    "many_short": {"lengths": (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7), "terms": Terms()},
    "zigzag": {"placement": "zigzag"},
    "zigzag_window": {"placement": "zigzag", "terms": Terms(window=(9, 4))},
    "zigzag_full": {"placement": "zigzag", "terms": Terms()},
    "contiguous": {"placement": "contiguous"},
    "contiguous_window": {"placement": "contiguous", "terms": Terms(window=(3, 14))},
    "documents": {"placement": "documents"},
    "rows_rounded_up": {"pad_to_multiple_of": 16},
    # cross-attention
    "cross": CROSS | {"terms": Terms()},
    "cross_causal": CROSS | {"scores": "sink"},
    "cross_top_left": CROSS | {"terms": Terms(causal="top_left")},
    "cross_window": CROSS | {"terms": Terms(window=(4, 3)), "gap": 4},
    "cross_zigzag": CROSS | {"placement": "zigzag"},
    "cross_documents": CROSS | {"placement": "documents", "garbage": float("nan")},
    "cross_plain": {"lengths": 11, "keys": 25, "batch": 2, "terms": Terms()},
    "cross_plain_bias": {"lengths": 11, "keys": 25, "batch": 2, "scores": "bias mask", "terms": Terms()},
    "cross_as_many_rows": {"lengths": (5, 19, 8), "keys": (20, 3, 9), "terms": Terms()},
    "cross_without_keys": {"lengths": (5, 3), "keys": (0, 0), "terms": Terms()},
}


def scheme_on(comm: str, ranks: int) -> dict[str, Any]:
    """A scheme on some number of ranks."""
    if comm == "a2a+p2p":
        return {"comm": comm, "ranks": (ranks // 2, 2) if ranks % 2 == 0 else (ranks, 1)}
    return {"comm": comm, "ranks": ranks}


#: Head dims of kernels on GPUs.
_DIMS = {"8": "64", "24/16": "192/128", "8/20": "32/64", "5/3": "40/24"}


def for_gpu(case: ContextCase) -> ContextCase:
    """The same with lengths, windows and dims that fill tiles of a kernel, not evenly, in half precision."""
    left, right = case.terms.window or (None, None)
    window = None if case.terms.window is None else (left and 13 * left, right and 13 * right)
    return replace(
        case,
        lengths=_longer(case.lengths),
        keys=_longer(case.keys),
        gap=64 if case.gap > 1 else 1,
        terms=replace(case.terms, window=window),
        dims=_DIMS.get(case.dims, case.dims),
        dtype="float16" if case.dtype == "float16" else "bfloat16",
    )


def _longer(lengths: Any) -> Any:
    if isinstance(lengths, tuple):
        return tuple(map(_longer, lengths))
    if lengths is None or lengths < 2:
        return lengths
    return 16 * lengths if lengths % 16 == 0 else 17 * lengths + 3
