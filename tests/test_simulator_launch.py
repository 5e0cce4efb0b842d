"""What a launch asks of a device, special registers, clusters, and functions of the runtime."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_text import kernel, launch, stored

from fused_peft import simulator

pytestmark = needs_simulator

INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES = 1, 9, 701
COOPERATIVE_TOO_LARGE, INVALID_CLUSTER = 720, 912


def error_of(ptx: str, grid: object, block: object, shared: int = 0, **how: object) -> int | None:
    """The CUDA error of a launch that is refused before it runs; None where it runs."""
    out = np.zeros(1, np.uint32)
    try:
        simulator.launch(ptx, "k", grid, block, [out], shared, **how)
    except simulator.SimulatorError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("grid", "block", "error"),
    [
        (1, 1024, None),
        (1, 1025, INVALID_CONFIGURATION),
        (1, (32, 33), INVALID_CONFIGURATION),
        (1, (1, 1, 64), None),
        (1, (1, 1, 65), INVALID_CONFIGURATION),
        (0, 32, INVALID_CONFIGURATION),
        (1, 0, INVALID_CONFIGURATION),
        ((1, 65536), 1, INVALID_CONFIGURATION),
        ((1, 1, 65536), 1, INVALID_CONFIGURATION),
    ],
)
def test_launch_dimensions(grid: object, block: object, error: int | None):
    assert error_of(kernel(""), grid, block) == error


@pytest.mark.parametrize(
    ("device", "most"), [("a100", 163), ("rtx4090", 99), ("h100", 227), ("h200", 227)]
)
def test_shared_memory_of_a_block(device: str, most: int):
    ptx = kernel("", target="sm_80")
    with simulator.use_device(device):
        assert error_of(ptx, 1, 32, most * 1024) is None
        assert error_of(ptx, 1, 32, most * 1024 + 1) == INVALID_VALUE


def test_launch_bounds_of_the_kernel():
    assert error_of(kernel("", directives=".maxntid 128, 1, 1"), 1, 128) is None
    assert error_of(kernel("", directives=".maxntid 128, 1, 1"), 1, 129) == INVALID_VALUE
    assert error_of(kernel("", directives=".reqntid 64, 2, 1"), 1, (64, 2)) is None
    assert error_of(kernel("", directives=".reqntid 64, 2, 1"), 1, 128) == INVALID_VALUE
    assert error_of(kernel("", directives=".maxnreg 128"), 1, 512) is None
    assert error_of(kernel("", directives=".maxnreg 128"), 1, 544) == OUT_OF_RESOURCES


def test_a_target_that_the_device_lacks():
    with simulator.use_device("a100"):
        assert error_of(kernel("", target="sm_80"), 1, 32) is None
        with pytest.raises(simulator.SimulatorError, match="sm_90"):
            simulator.launch(kernel("", target="sm_90"), "k", 1, 32, [np.zeros(1, np.uint32)])
    with simulator.use_device("h100"):
        assert error_of(kernel("", target="sm_80"), 1, 32) is None
        assert error_of(kernel("", target="sm_90a"), 1, 32) is None


@pytest.mark.parametrize(
    ("device", "sms", "threads"), [("a100", 108, 2048), ("rtx4090", 128, 1536)]
)
def test_cooperative_grids_fit_on_the_device(device: str, sms: int, threads: int):
    ptx = kernel("", target="sm_80")
    resident = sms * (threads // 512)
    with simulator.use_device(device):
        assert error_of(ptx, resident, 512, cooperative=True) is None
        assert error_of(ptx, resident + 1, 512, cooperative=True) == COOPERATIVE_TOO_LARGE
        assert error_of(ptx, resident + 1, 512) is None
        # One block an SM where each takes more than half of its shared memory.
        assert error_of(ptx, sms, 512, 60 * 1024, cooperative=True) is None


def test_cluster_sizes():
    ptx = kernel("")
    with simulator.use_device("h100"):
        assert error_of(ptx, 16, 32, cluster=8) is None
        assert error_of(ptx, 32, 32, cluster=16) is None
        assert error_of(ptx, 34, 32, cluster=17) == INVALID_CLUSTER
        assert error_of(ptx, 9, 32, cluster=2) == INVALID_CONFIGURATION
    with simulator.use_device("a100"):
        assert error_of(kernel("", target="sm_80"), 2, 32, cluster=2) == INVALID_CLUSTER
    required = kernel("", directives=".reqnctapercluster 4, 1, 1")
    assert error_of(required, 8, 32, cluster=4) is None
    assert error_of(required, 8, 32, cluster=2) == INVALID_CLUSTER


SPECIALS = {
    "tid.x": lambda t: t["x"],
    "tid.y": lambda t: t["y"],
    "tid.z": lambda t: t["z"],
    "ntid.x": lambda t: 4,
    "ntid.y": lambda t: 3,
    "ntid.z": lambda t: 5,
    "nctaid.x": lambda t: 1,
    "laneid": lambda t: t["thread"] % 32,
    "warpid": lambda t: t["thread"] // 32,
    "lanemask_eq": lambda t: 1 << t["thread"] % 32,
    "lanemask_lt": lambda t: (1 << t["thread"] % 32) - 1,
    "lanemask_le": lambda t: (2 << t["thread"] % 32) - 1,
    "lanemask_gt": lambda t: 0xFFFFFFFF ^ ((2 << t["thread"] % 32) - 1),
    "lanemask_ge": lambda t: 0xFFFFFFFF ^ ((1 << t["thread"] % 32) - 1),
    "nsmid": lambda t: 132,
    "dynamic_smem_size": lambda t: 256,
}


@pytest.mark.parametrize("name", SPECIALS)
def test_special_registers(name: str):
    ptx = kernel(
        f"""
  mov.u32 %r0, %{name};
  mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z;
  mad.lo.u32 %r1, %r2, 3, %r1;
  mad.lo.u32 %r1, %r1, 4, %t;
  ld.param.u64 %rd0, [out];
  mad.wide.u32 %rd0, %r1, 4, %rd0;
  st.global.u32 [%rd0], %r0;
"""
    )
    out = np.zeros(60, np.uint32)
    with simulator.use_device("h100"):
        simulator.launch(ptx, "k", 1, (4, 3, 5), [out], 256)
    threads = np.arange(60)
    place = {"thread": threads, "x": threads % 4, "y": threads // 4 % 3, "z": threads // 12}
    np.testing.assert_array_equal(out, np.broadcast_to(SPECIALS[name](place), 60))


def test_clocks_go_forward():
    ptx = kernel(
        """
  mov.u64 %rd0, %clock64;
  mov.u64 %rd1, %clock64;
  setp.lt.u64 %p0, %rd0, %rd1;
  selp.u32 %r0, 1, 0, %p0;
{store}"""
    )
    np.testing.assert_array_equal(stored(ptx, 64), np.ones(64))


CLUSTER_PLACE = """
  mov.u32 %r1, %cluster_ctarank;
  mov.u32 %r2, %cluster_nctarank;
  mov.u32 %r3, %clusterid.x;
  mov.u32 %r4, %nclusterid.x;
  shl.b32 %r2, %r2, 8; shl.b32 %r3, %r3, 16; shl.b32 %r4, %r4, 24;
  add.u32 %r0, %r1, %r2; add.u32 %r0, %r0, %r3; add.u32 %r0, %r0, %r4;
{store}"""


def test_place_in_a_cluster():
    out = np.zeros(12, np.uint32)
    assert launch(kernel(CLUSTER_PLACE), 12, 1, out, cluster=4) == []
    cta = np.arange(12)
    np.testing.assert_array_equal(out, cta % 4 + (4 << 8) + (cta // 4 << 16) + (3 << 24))


# Every block of a cluster writes to its slot in global memory, then reads the next one's.
CLUSTER_EXCHANGE = """
  ld.param.u64 %rd0, [slots];
  mad.wide.u32 %rd1, %c, 4, %rd0;
  add.u32 %r1, %c, 10;
  setp.ne.u32 %p0, %t, 0;
  @!%p0 st.global.u32 [%rd1], %r1;
  {barrier}
  xor.b32 %r2, %c, 1;
  mad.wide.u32 %rd2, %r2, 4, %rd0;
  ld.global.u32 %r0, [%rd2];
{{store}}"""


@pytest.mark.parametrize("seed", range(3))
def test_cluster_barrier(seed: int):
    barrier = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    ptx = kernel(CLUSTER_EXCHANGE.format(barrier=barrier), "out slots")
    out = np.zeros(8 * 64, np.uint32)
    assert launch(ptx, 8, 64, out, np.zeros(8, np.uint32), cluster=2, seed=seed) == []
    np.testing.assert_array_equal(out, 10 + (np.arange(8) ^ 1).repeat(64))


@pytest.mark.parametrize(
    "barrier",
    ["", "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;", "bar.sync 0;"],
)
def test_a_missing_cluster_barrier_is_a_race(barrier: str):
    ptx = kernel(CLUSTER_EXCHANGE.format(barrier=barrier), "out slots")
    found = launch(ptx, 8, 64, np.zeros(512, np.uint32), np.zeros(8, np.uint32), cluster=2)
    assert {f.kind for f in found} == {"race"}


@pytest.mark.parametrize(
    ("barrier", "text"),
    [
        ("barrier.cluster.wait;", "without barrier.cluster.arrive"),
        ("barrier.cluster.arrive; barrier.cluster.arrive; barrier.cluster.wait;", "a second time"),
    ],
)
def test_wrong_use_of_the_cluster_barrier(barrier: str, text: str):
    found = launch(kernel(barrier), 2, 32, np.zeros(1, np.uint32), cluster=2)
    assert found
    assert all(text in f.text for f in found)


def test_cluster_deadlock():
    ptx = kernel(
        "setp.eq.u32 %p0, %c, 0; @%p0 bra END; barrier.cluster.arrive; barrier.cluster.wait;"
        " END: bar.sync 0; bar.sync 1, 64;"
    )
    with pytest.raises(simulator.SimulatorError) as caught:
        launch(ptx, 2, 32, np.zeros(1, np.uint32), cluster=2)
    assert "barrier.cluster, where 32 of 64 threads have arrived" in str(caught.value)


SETMAXNREG = """
  setp.lt.u32 %p0, %t, 128;
  @%p0 bra PRODUCER;
  setmaxnreg.inc.sync.aligned.u32 {consumer};
  bra END;
PRODUCER:
  setmaxnreg.dec.sync.aligned.u32 {producer};
END:
  mov.u32 %r0, 1;
{{store}}"""


def setmaxnreg(producer: int, consumer: int) -> str:
    return kernel(
        SETMAXNREG.format(producer=producer, consumer=consumer),
        target="sm_90a",
        directives=".maxntid 384, 1, 1",
    )


def test_setmaxnreg_shares_out_the_registers_of_the_block():
    # 168 registers a thread at the start: 40 + 2 x 232 = 3 x 168.
    assert launch(setmaxnreg(40, 232), 1, 384, np.zeros(384, np.uint32)) == []
    with pytest.raises(simulator.SimulatorError, match=r"setmaxnreg\.dec") as caught:
        launch(setmaxnreg(48, 232), 1, 384, np.zeros(384, np.uint32))
    assert caught.value.code == 702
    found = launch(setmaxnreg(200, 160), 1, 384, np.zeros(384, np.uint32))
    texts = {f.instruction.split(".sync")[0]: f.text for f in found}
    assert "below the warp's 168 registers" in texts["setmaxnreg.inc"]


CALL = """
  {{
  .param .b64 a; .param .b64 b; .param .b32 r;
  mov.u64 %rd0, text; cvta.global.u64 %rd0, %rd0;
  .local .align 8 .b8 list[40];
  mov.u64 %rd1, list; cvta.local.u64 %rd2, %rd1;
  {fill}
  st.param.b64 [a], %rd0;
  st.param.b64 [b], %rd2;
  call.uni (r), vprintf, (a, b);
  ld.param.b32 %r0, [r];
  }}
{{store}}"""
VPRINTF = ".extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);\n"


def text_global(name: str, text: str) -> str:
    data = text.encode() + b"\0"
    return f".global .align 1 .b8 {name}[{len(data)}] = {{{', '.join(map(str, data))}}};\n"


def test_printf(capfd: pytest.CaptureFixture[str]):
    fill = """
  st.local.u32 [%rd1], %t;
  mov.f64 %fd0, 0d3FF8000000000000;
  st.local.f64 [%rd1+8], %fd0;
  mov.u64 %rd3, word; cvta.global.u64 %rd3, %rd3;
  st.local.u64 [%rd1+16], %rd3;
  mov.u64 %rd4, -5;
  st.local.u64 [%rd1+24], %rd4;
  mov.u32 %r5, 65;
  st.local.u32 [%rd1+32], %r5;
"""
    ptx = kernel(
        ".reg .f64 %fd<2>;" + CALL.format(fill=fill).replace("{{", "{").replace("}}", "}"),
        globals_=VPRINTF
        + text_global("text", "%03d|%.2f|%5s|%lld|%c|100%%\n")
        + text_global("word", "abc"),
    )
    out = np.zeros(3, np.uint32)
    assert launch(ptx, 1, 3, out) == []
    lines = capfd.readouterr().out.splitlines()
    assert lines == [f"00{i}|1.50|  abc|-5|A|100%" for i in range(3)]
    np.testing.assert_array_equal(out, [5, 5, 5])


def test_assert_names_its_place_and_threads():
    ptx = kernel(
        """
  setp.ne.u32 %p0, %t, 6;
  @%p0 bra END;
  {
  .param .b64 message; .param .b64 file; .param .b32 line; .param .b64 function; .param .b64 size;
  mov.u64 %rd0, what; cvta.global.u64 %rd0, %rd0;
  st.param.b64 [message], %rd0;
  mov.u64 %rd0, where; cvta.global.u64 %rd0, %rd0;
  st.param.b64 [file], %rd0;
  st.param.b32 [line], 42;
  mov.u64 %rd0, function_name; cvta.global.u64 %rd0, %rd0;
  st.param.b64 [function], %rd0;
  st.param.b64 [size], 1;
  call.uni __assertfail, (message, file, line, function, size);
  }
END: mov.u32 %r0, 0;
{store}""",
        globals_=".extern .func __assertfail (.param .b64 a, .param .b64 b, .param .b32 c,"
        " .param .b64 d, .param .b64 e);\n"
        + text_global("what", "n > 0")
        + text_global("where", "k.cu")
        + text_global("function_name", "f(int)"),
    )
    with pytest.raises(simulator.SimulatorError) as caught:
        launch(ptx, 1, 32, np.zeros(32, np.uint32))
    assert caught.value.code == 710
    assert "k.cu:42: f(int): assertion `n > 0` failed" in str(caught.value)
    assert "warp 0, lanes 6" in str(caught.value)


def test_counts_of_barriers():
    stored(kernel("bar.sync 0; bar.sync 1; mov.u32 %r0, 1;{store}"), 96, grid=3)
    [counts] = simulator.counters()
    assert counts.barriers == 6
    assert counts.by_class["barrier"] == 3 * 3 * 2
