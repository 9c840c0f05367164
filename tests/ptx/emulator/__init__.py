"""A functional interpreter of PTX in NumPy, for kernels whose GPU is not at hand.

**The machine.** A warp is 32 lanes that execute one instruction as one NumPy operation. Lanes that
branch apart form groups, each with its own place in the program, which merge when they meet;
instructions that are `.sync` or `.aligned` wait for all of the warp's lanes. Warps, blocks and
clusters take turns of random length. Registers, shared memory and tensor memory start as garbage
that decodes to NaN. Global memory is NumPy arrays: an access outside of them, or a misaligned one,
is an error.

**Asynchronous operations.** Copies by TMA, products and copies of tcgen05, and loads from tensor
memory take effect at a random time between their issue and the moment at which a barrier's phase
(or `tcgen05.wait`) tells of them: copies in any order, tcgen05 operations of one block in order
of issue. The destination of a copy is garbage from its issue on. One seed makes one schedule; a
kernel that forgets to wait gives wrong numbers or NaN under some seed, or all, and one that waits
for what never comes ends in `Deadlock`, which names the place where each warp stands. Threads that
end before their asynchronous operations, or without freeing tensor memory, are an error.

**Products**, of bfloat16 and block-scaled of E4M3 and E2M1, follow the layouts of the
instruction: descriptors of shared memory, the 128-byte swizzle as a function of the address,
scales spread over lanes and columns of tensor memory and replicated four times. Products and sums
are float64, rounded to float32 once an instruction.

**What it cannot see.** A missing proxy fence or a memory order that is too weak: all ordinary
accesses happen at once and in one order. (`tcgen05.fence` is checked, by rule:
see `tensor`.)
Rounding inside the tensor cores, bank conflicts, alignment rules beyond those asserted, limits of
registers, encodings that only the assembler would refuse, and speed. An instruction that it
does not know is an error when the program is linked, never skipped. What it shows is that the
kernel computes the right numbers if the hardware does what the layouts above say; not that it
was run on the hardware.

Modules: `parser` (text to instructions), `lanes` (registers and operand access), `arithmetic`,
`control` (branches, barriers of threads, shuffles), `memory`, `mbarrier`, `tma`, `tensor`
(tensor memory and tcgen05), `cluster_launch`, `machine` (warps, blocks, schedule).
"""

from tests.ptx.emulator import (  # noqa: F401
    arithmetic,
    cluster_launch,
    control,
    mbarrier,
    memory,
    tensor,
    tma,
)
from tests.ptx.emulator.machine import Deadlock, Launch, launch
from tests.ptx.emulator.memory import GlobalMemory, MemoryFault
from tests.ptx.emulator.parser import parse
from tests.ptx.emulator.tma import TensorMap

__all__ = ["Deadlock", "GlobalMemory", "Launch", "MemoryFault", "TensorMap", "launch", "parse"]
