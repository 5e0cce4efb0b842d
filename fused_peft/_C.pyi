from typing import Any

max_rank: int
cuda_max_rank: int
max_head_dim: int

def build_info() -> dict[str, Any]: ...
def available_cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(isa: str) -> None: ...
def lora_linear_plan(
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    factor_float: bool = False,
    dropout: bool = False,
    weight_k_major: bool = True,
    aligned: bool = True,
    num_sms: int,
    shared_per_block: int,
    major: int,
) -> dict[str, Any]: ...
def prefix_attention_plan(
    batch: int,
    q_heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    prefix: int,
    head_dim: int,
    shared_prefix: bool = True,
    *,
    num_sms: int,
    shared_per_block: int,
    major: int,
) -> dict[str, Any]: ...
