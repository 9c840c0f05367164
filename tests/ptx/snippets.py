"""Small kernels in PTX, for tests of the emulator itself."""

import textwrap

import numpy as np

from tests.ptx.emulator import GlobalMemory, launch, parse

REGISTERS = """
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<64>;
.reg .f32 %f<16>;
.reg .b64 %d<32>;
"""


def kernel_text(body: str, num_pointers: int, shared: str = "") -> str:
    parameters = ",\n".join(f".param .u64 pointer_{i}" for i in range(num_pointers))
    return f"""
.version 9.0
.target sm_100f
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry snippet({parameters}
)
{{
{REGISTERS}
{shared}
{textwrap.dedent(body)}
ret;
}}
"""


def run(body: str, *arrays: np.ndarray, shared: str = "", threads: int = 32, **options) -> None:
    """Runs one cluster (`cluster` blocks of `threads`); pointer_i is the address of array i."""
    memory = GlobalMemory()
    launch(
        parse(kernel_text(body, len(arrays), shared), "snippet"),
        grid=(options.get("cluster", 1),),
        block=threads,
        arguments=[memory.place(array).to_bytes(8, "little") for array in arrays],
        memory=memory,
        **{"dynamic_shared_bytes": 0, **options},
    )


# %d0: this thread's place in pointer_0, in units of {size} bytes; %r0: the thread's number.
def places(size: int, pointers: int = 1) -> str:
    lines = ["mov.u32 %r0, %tid.x;"]
    for i in range(pointers):
        lines += [
            f"ld.param.u64 %d{i}, [pointer_{i}];",
            f"mad.wide.u32 %d{i}, %r0, {size}, %d{i};",
        ]
    return "\n".join(lines) + "\n"
