"""PTX text to a kernel: instructions, registers, shared variables, parameters."""

import dataclasses
import re

# Shared memory begins after what the system takes for itself.
SYSTEM_SHARED_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class Register:
    index: int
    is_predicate: bool


@dataclasses.dataclass(frozen=True)
class Immediate:
    bits: int


@dataclasses.dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str
    axis: int


@dataclasses.dataclass(frozen=True)
class Symbol:
    space: str
    offset: int


@dataclasses.dataclass(frozen=True)
class Address:
    base: object
    offset: int


@dataclasses.dataclass(frozen=True)
class TensorAddress:
    """A tensor map and coordinates in it."""

    base: object
    coordinates: tuple


@dataclasses.dataclass(frozen=True)
class Vector:
    elements: tuple


@dataclasses.dataclass(frozen=True)
class Pair:
    """`destination|predicate`."""

    first: object
    second: object


@dataclasses.dataclass(frozen=True)
class Negated:
    predicate: Register


@dataclasses.dataclass(frozen=True)
class Sink:
    """`_`: the result is not wanted."""


@dataclasses.dataclass
class Instruction:
    text: str
    opcode: str
    operands: list
    guard: Register | None = None
    guard_negated: bool = False
    target: int | None = None

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclasses.dataclass(eq=False)
class Kernel:
    name: str
    instructions: list[Instruction]
    num_registers: int
    static_shared_bytes: int
    parameters: list[tuple[int, int]]  # (offset, bytes)
    constants: bytes

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters), default=0)


SPECIALS = {
    "%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid", "%cluster_ctarank",
    "%cluster_nctarank", "%cluster_ctaid", "%cluster_nctaid", "%clusterid", "%nclusterid",
}  # fmt: skip


_ALIGNED_TYPE = r"(?:\.align\s+(\d+)\s+)?\.[busf](\d+)"


def parse(text: str, name: str) -> Kernel:
    """The kernel whose (mangled) name contains `name`; ValueError if not exactly one does."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    names = [n for n in re.findall(r"\.entry\s+([\w$]+)", text) if name in n]
    if len(names) != 1:
        raise ValueError(f"name: {name!r} fits {names}, expected one kernel")
    start = re.search(rf"\.entry\s+{re.escape(names[0])}\b", text).end()
    body_start = text.index("{", text.index(")", start))
    body = text[body_start + 1 : _matching_brace(text, body_start)]
    symbols, parameters = _parameters(text[start:body_start])
    shared_end = _shared_variables(text, body, symbols)
    constants = _constants(text, symbols)
    assembler = _Assembler(symbols)
    assembler.scope(body)
    assembler.check()
    return Kernel(
        names[0],
        assembler.instructions,
        assembler.num_registers,
        shared_end,
        parameters,
        constants,
    )


def _matching_brace(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    raise ValueError("text: a brace is not closed")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _parameters(header: str) -> tuple[dict[str, Symbol], list[tuple[int, int]]]:
    symbols, parameters, end = {}, [], 0
    declaration = rf"\.param\s+{_ALIGNED_TYPE}[^,\[)]*?\s([\w$]+)(?:\[(\d+)\])?\s*[,)]"
    for alignment, bits, name, count in re.findall(declaration, header):
        size = int(bits) // 8
        offset = _aligned(end, int(alignment or size))
        end = offset + size * int(count or 1)
        symbols[name] = Symbol("param", offset)
        parameters.append((offset, end - offset))
    return symbols, parameters


def _shared_variables(text: str, body: str, symbols: dict[str, Symbol]) -> int:
    end = SYSTEM_SHARED_BYTES
    declaration = rf"(?<!\.extern )\.shared\s+{_ALIGNED_TYPE}\s+([\w$]+)(?:\[(\d+)\])?\s*;"
    module_scope = re.sub(r"\{.*?\n\}", "", text, flags=re.DOTALL)
    for alignment, bits, name, count in re.findall(declaration, module_scope + body):
        size = int(bits) // 8
        offset = _aligned(end, int(alignment or size))
        end = offset + size * int(count or 1)
        symbols[name] = Symbol("shared", offset)
    for name in re.findall(r"\.extern\s+\.shared[^;]*?\.b8\s+([\w$]+)\[\]", text):
        end = _aligned(end, 16)
        symbols[name] = Symbol("shared", end)
    return end


def _constants(text: str, symbols: dict[str, Symbol]) -> bytes:
    array = rf"\.(?:global|const)\s+{_ALIGNED_TYPE}\s+([\w$]+)\[(\d+)\](?:\s*=\s*\{{([^}}]*)\}})?"
    data = b""
    for alignment, bits, name, size, values in re.findall(array, text):
        if bits != "8":
            raise NotImplementedError(f"text: {name} is not an array of bytes")
        data = data.ljust(_aligned(len(data), int(alignment or 1)), b"\0")
        symbols[name] = Symbol("constant", len(data))
        data += bytes(int(v, 0) for v in values.split(",") if v.strip()).ljust(int(size), b"\0")
    return data


class _Assembler:
    """Walks nested scopes: inline assembly declares registers and labels of its own."""

    def __init__(self, symbols: dict[str, Symbol]):
        self.symbols = symbols
        self.instructions: list[Instruction] = []
        self.num_registers = 0
        self._registers: list[dict[str, Register]] = []
        self._branches: list[tuple[Instruction, str]] = []

    def check(self) -> None:
        if self._branches:
            raise ValueError(f"text: no label for {[label for _, label in self._branches]}")

    def scope(self, body: str) -> None:
        self._registers.append({})
        labels: dict[str, int] = {}
        first_branch = len(self._branches)
        position = 0
        while True:
            body_rest = body[position:]
            position += len(body_rest) - len(body_rest.lstrip())
            if position >= len(body):
                break
            if body[position] == "{":
                end = _matching_brace(body, position)
                self.scope(body[position + 1 : end])
                position = end + 1
            elif label := re.compile(r"([\w$]+):(?!:)").match(body, position):
                labels[label[1]] = len(self.instructions)
                position = label.end()
            else:
                end = body.index(";", position)
                self._statement(" ".join(body[position:end].split()))
                position = end + 1
        unresolved = []
        for instruction, label in self._branches[first_branch:]:
            if label in labels:
                instruction.target = labels[label]
            else:
                unresolved.append((instruction, label))
        self._branches[first_branch:] = unresolved
        self._registers.pop()

    def _statement(self, statement: str) -> None:
        if statement.startswith(".reg"):
            self._declare(statement)
        elif not statement.startswith("."):
            self._instruction(statement)

    def _declare(self, statement: str) -> None:
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", statement).groups()
        for name in names.split(","):
            prefix, count = re.fullmatch(r"\s*([%\w$]+)(?:<(\d+)>)?\s*", name).groups()
            for expanded in [f"{prefix}{i}" for i in range(int(count))] if count else [prefix]:
                self._registers[-1][expanded] = Register(self.num_registers, kind == "pred")
                self.num_registers += 2 if kind == "b128" else 1

    def _instruction(self, statement: str) -> None:
        guard = re.match(r"@(!?)([%\w$]+) ", statement)
        rest = statement[guard.end() :] if guard else statement
        opcode, operands = re.fullmatch(r"([\w.:]+) ?(.*)", rest).groups()
        instruction = Instruction(statement, opcode, [])
        if guard:
            instruction.guard = self._register(guard[2])
            instruction.guard_negated = bool(guard[1])
        if opcode.split(".")[0] == "bra":
            self._branches.append((instruction, operands))
        elif not opcode.startswith(("call", "st.param")):  # calls are not made: see `control`
            instruction.operands = [self._operand(o) for o in _split(operands)]
        self.instructions.append(instruction)

    def _register(self, name: str) -> Register:
        for scope in reversed(self._registers):
            if name in scope:
                return scope[name]
        raise ValueError(f"text: {name!r} is not declared")

    def _operand(self, text: str) -> object:
        if text.startswith("{"):
            return Vector(tuple(self._operand(o) for o in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if "|" in text:
            return Pair(*(self._operand(part.strip()) for part in text.split("|")))
        if text == "_":
            return Sink()
        if text.startswith("!"):
            return Negated(self._register(text[1:]))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0) & (2**64 - 1))
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return Immediate(int(text[2:], 16))
        name, _, axis = text.partition(".")
        if name in SPECIALS:
            return Special(name, "xyz".index(axis) if axis else 0)
        if text in self.symbols:
            return self.symbols[text]
        return self._register(text)

    def _address(self, text: str) -> Address | TensorAddress:
        parts = _split(text)
        if len(parts) == 2:
            coordinates = tuple(self._operand(o) for o in _split(parts[1][1:-1]))
            return TensorAddress(self._operand(parts[0]), coordinates)
        base, offset = re.fullmatch(r"([%\w$]+)(?:\s*\+\s*(-?\w+))?", text).groups()
        return Address(self._operand(base), int(offset, 0) if offset else 0)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts
