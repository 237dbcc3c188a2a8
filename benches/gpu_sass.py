"""Reads the machine code of GPU kernels (SASS, as nvdisasm prints it) and counts what it does.

The code of a kernel is divided into segments: each loop without the loops inside it, and the code
outside of all loops. For a segment, this module counts the instructions by the unit that executes
them, and the bytes that a thread loads and stores. It estimates

- how many bytes of global loads a thread has in flight: the loads that are issued before the first
  instruction that needs one of them (`bytes_in_flight`),
- how long a single warp takes: instructions are issued in order, each as soon as its operands are
  ready (`chain_cycles`), with the latencies of LATENCY.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

# Cycles from the issue of an instruction to the issue of one that needs its result. The values are
# assumptions, rounded from published microbenchmarks of A100 and H100. A global load is taken to
# hit the L1 cache here; the model adds the latency of memory where it matters.
LATENCY = {
    "fma": 4,
    "alu": 5,
    "mufu": 20,
    "convert": 14,
    "fp64": 8,
    "tensor": 33,
    "shuffle": 24,
    "shared": 29,
    "generic load": 33,  # from shared memory
    "global load": 36,
    "local": 36,
    "barrier": 30,
    "other": 6,
}

_UNITS = (  # (unit, beginnings of opcodes); the first match counts
    ("fma", ("FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2")),
    ("fp64", ("DFMA", "DADD", "DMUL", "DSETP", "DMNMX")),
    ("tensor", ("HMMA", "DMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "OMMA")),
    ("mufu", ("MUFU",)),
    ("convert", ("F2F", "I2F", "F2I", "FRND")),
    ("shuffle", ("SHFL", "REDUX")),
    ("async copy", ("LDGSTS", "UBLKCP", "UTMALDG")),
    ("global load", ("LDG",)),
    ("global store", ("STG", "RED", "ATOMG", "ATOM")),
    ("shared", ("LDSM", "LDS", "STS", "STSM", "ATOMS")),
    ("generic load", ("LD.",)),
    ("generic store", ("ST.",)),
    ("local", ("LDL", "STL")),
    ("barrier", ("BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "SYNCS", "MEMBAR", "FENCE", "ERRBAR", "CCTL")),
    ("alu", ("IADD", "LOP", "ISETP", "FSETP", "FSEL", "SEL", "FMNMX", "IMNMX", "VIMNMX", "SHF", "LEA", "PRMT", "MOV", "PLOP3", "POPC", "FLO",
             "IABS", "SGXT", "BMSK", "F2FP", "FCHK", "CS2R", "VIADD", "FMNMX3", "HSETP2", "HMNMX2", "FSWZADD", "P2R", "R2P", "BREV", "I2FP", "I2IP")),
)  # fmt: skip
# Instructions of the uniform data path and of control flow. They take issue slots and no other unit
# that the model counts.


def unit_of(opcode: str) -> str:
    """Return the unit that executes an opcode such as "FFMA.FTZ"."""
    for unit, beginnings in _UNITS:
        if opcode.startswith(beginnings):
            return unit
    return "other"


def width_of(opcode: str) -> int:
    """Return the bytes that a thread loads or stores with this opcode."""
    parts = opcode.split(".")
    for suffix, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1), ("256", 32)):
        if suffix in parts:
            return width
    return 4


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with suffixes
    guard: str  # predicate such as "P0" or "!P0", or ""
    reads: frozenset[str]
    writes: frozenset[str]
    target: str = ""  # label of a branch, or function of a call
    line: tuple[str, int] = ("", 0)  # file and line of the source

    @property
    def unit(self) -> str:
        return unit_of(self.opcode)


@dataclass
class Function:
    """A kernel, or a function that a kernel calls."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction after the label


@dataclass(frozen=True)
class Segment:
    """What one iteration of a loop does, without the loops inside it; or the code outside of loops.

    Bytes are per thread.
    """

    function: str  # "" for the kernel itself
    line: str  # the line of the source that most instructions come from, such as "file.py:12"
    depth: int  # 0: outside of loops
    innermost: bool  # whether the loop contains no other loop
    instructions: dict[str, int]  # by unit
    loads: dict[int, int]  # global loads by width in bytes
    stores: dict[int, int]
    copies: dict[int, int]  # asynchronous copies from global to shared memory
    exponentials: int  # MUFU.EX2
    shared_bytes: int
    bytes_in_flight: int
    chain_cycles: float  # if every global load hits the L1 cache
    load_rounds: float  # how often the chain waits for global loads

    @property
    def total(self) -> int:
        return sum(self.instructions.values())

    @property
    def load_bytes(self) -> int:
        return sum(width * count for width, count in self.loads.items())

    @property
    def store_bytes(self) -> int:
        return sum(width * count for width, count in self.stores.items())


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_REGISTER = re.compile(r"(?<![\w.])(U?[RP]\d+)\b(\.64|\.H0_H0|\.H1_H1)?")


def _span(register: str, count: int) -> Iterator[str]:
    kind, number = re.match(r"(\D+)(\d+)", register).groups()  # type: ignore[union-attr]
    for i in range(count):
        yield f"{kind}{int(number) + i}"


def _is_wide(opcode: str) -> bool:
    return opcode.startswith(("DFMA", "DADD", "DMUL", "DSETP", "DMNMX"))


def parse_instruction(line: str) -> Instruction | None:
    """Parse a line of nvdisasm's output; returns None if it has no instruction."""
    match = _LINE.match(line)
    if match is None:
        return None
    address, guard, opcode, operands = match.groups()
    target = re.search(r"`\((.+?)\)", operands)
    text = re.sub(r"`\(.*?\)", "", operands)
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text)] if text else []
    unit = unit_of(opcode)
    writes: set[str] = set()
    reads: set[str] = set()
    has_result = not opcode.startswith(("ST", "BRA", "BAR", "EXIT", "RED", "BSYNC", "CALL", "RET", "NOP", "LDGSTS", "DEPBAR", "WARPSYNC", "MEMBAR"))
    only_predicates = "SETP" in opcode or opcode.startswith(("PLOP3", "FCHK", "UPLOP3", "VOTEU"))
    wants_register, leading = has_result and not only_predicates, has_result
    for part in parts:
        found = [(m.group(1), m.group(2)) for m in _REGISTER.finditer(part.replace("|", " ").replace("-", " ").replace("!", " ").replace("~", " "))]
        if leading and found and found[0][0].lstrip("U").startswith("P"):
            writes.add(found[0][0])
            continue
        if leading and part in ("PT", "UPT"):
            continue
        if leading and wants_register:
            leading = False
            if found:
                count = 1
                if opcode.startswith("LD") and not opcode.startswith("LDGSTS"):
                    count = max(1, width_of(opcode) // 4)
                elif _is_wide(opcode) or ".WIDE" in opcode or opcode.startswith(("CS2R", "F2F.F64", "I2F.F64")):
                    count = 2
                elif unit == "tensor":
                    count = 4
                writes.update(_span(found[0][0], count))
                continue
            if part in ("RZ", "URZ"):
                continue
        leading = False
        for register, suffix in found:
            count = 2 if suffix == ".64" or _is_wide(opcode) else 1
            if opcode.startswith("ST") and "[" not in part:
                count = max(1, width_of(opcode) // 4)
            if register.lstrip("U").startswith("P"):
                count = 1
            reads.update(_span(register, count))
    if guard:
        reads.add(guard.lstrip("!"))
    return Instruction(int(address, 16), opcode, guard or "", frozenset(reads), frozenset(writes), target.group(1) if target else "")


def parse(text: str) -> dict[str, list[Function]]:
    """Parse the output of `nvdisasm -c -g`.

    Returns the functions of each kernel, by mangled name. The first function is the kernel itself.
    """
    kernels: dict[str, list[Function]] = {}
    functions: list[Function] = []
    source = ("", 0)
    for line in text.splitlines():
        if section := re.match(r"^\s*\.section\s+\.text\.(\S+?),", line):
            functions = kernels.setdefault(section.group(1), [])
        elif label := re.match(r"^(\.L_x?_?\w+):", line):
            if functions:
                functions[-1].labels[label.group(1)] = len(functions[-1].instructions)
        elif (name := re.match(r"^([$\w]+):", line)) and not line.startswith(".text"):
            functions.append(Function(name.group(1)))
        elif at := re.match(r'^\s*//## File "(.+?)", line (\d+)', line):
            source = (at.group(1), int(at.group(2)))
        elif functions and (instruction := parse_instruction(line)):
            functions[-1].instructions.append(replace(instruction, line=source))
    return {name: found for name, found in kernels.items() if found and found[0].instructions}


@dataclass(frozen=True)
class _Loop:
    first: int  # indices of instructions
    last: int


def loops_of(function: Function) -> list[_Loop]:
    """Return the loops of a function: from the target of a backward branch to the branch."""
    ends: dict[int, int] = {}
    for index, instruction in enumerate(function.instructions):
        target = function.labels.get(instruction.target)
        if instruction.opcode.startswith("BRA") and target is not None and target < index:
            ends[target] = max(ends.get(target, 0), index)
    return [_Loop(first, last) for first, last in sorted(ends.items())]


def segments_of(function: Function, name: str = "") -> list[Segment]:
    """Return the segments of a function, the code outside of loops first."""
    loops = loops_of(function)
    code = function.instructions
    result = [_segment(name, 0, False, _usual_path(function, range(len(code)), loops))]
    for loop in loops:
        inner = [other for other in loops if other is not loop and loop.first <= other.first and other.last <= loop.last]
        depth = 1 + sum(other is not loop and other.first <= loop.first and loop.last <= other.last for other in loops)
        result.append(_segment(name, depth, not inner, _usual_path(function, range(loop.first, loop.last + 1), inner)))
    return [segment for segment in result if segment.instructions]


def _usual_path(function: Function, indices: range, loops: Iterable[_Loop]) -> list[Instruction]:
    """Return the instructions that are usually executed, without those of the given loops.

    A conditional branch forward is not taken, with two exceptions. It is taken around a call of a
    function of the compiler, because such calls are the rare cases of divisions and square roots.
    It is taken to an asynchronous copy if the code after the branch has none: this is the choice
    between numbers that are copied and numbers that are converted.
    """
    code, path, index = function.instructions, [], indices.start
    skip = {loop.first: loop.last + 1 for loop in loops}
    while index < indices.stop:
        if index in skip:
            index = max(skip[index], index + 1)
            continue
        instruction = code[index]
        path.append(instruction)
        target = function.labels.get(instruction.target, -1)
        index += 1
        if instruction.opcode.startswith(("EXIT", "RET")) and not instruction.guard:
            break
        if not instruction.opcode.startswith("BRA") or not index <= target < indices.stop:
            continue
        between = code[index:target]
        conditional = bool(instruction.guard) or ".U" in instruction.opcode
        has_call = any(i.opcode.startswith("CALL") and "internal" in i.target for i in between)
        around_call = has_call and len(between) < 40 and not any(i.unit == "mufu" for i in between)
        if not conditional or around_call or (_copies(code, target) and not _copies(code, index)):
            index = target
    return path


def _copies(code: list[Instruction], index: int) -> bool:
    """Return whether there is an asynchronous copy before the next branch."""
    for instruction in code[index:]:
        if instruction.unit == "async copy":
            return True
        if instruction.opcode.startswith("BRA"):
            return False
    return False


def _segment(function: str, depth: int, innermost: bool, path: list[Instruction]) -> Segment:
    is_loop = depth > 0
    path = [i for i in path if not i.opcode.startswith("NOP")]
    loads, stores, copies = (Counter(width_of(i.opcode) for i in path if i.unit == unit) for unit in ("global load", "global store", "async copy"))
    lines = Counter(i.line for i in path if "site-packages" not in i.line[0])  # without the libraries of the compiler
    chain, slower_chain = (chain_cycles(path, is_loop, latency) for latency in (LATENCY["global load"], 1000))
    file, number = lines.most_common(1)[0][0] if lines else ("", 0)
    return Segment(
        function,
        f"{file}:{number}",
        depth,
        innermost,
        dict(sorted(Counter(i.unit for i in path).items())),
        dict(sorted(loads.items())),
        dict(sorted(stores.items())),
        dict(sorted(copies.items())),
        sum(i.opcode.startswith("MUFU.EX2") for i in path),
        sum(width_of(i.opcode) for i in path if i.unit in ("shared", "generic load", "generic store")),
        bytes_in_flight(path, is_loop),
        chain,
        round((slower_chain - chain) / (1000 - LATENCY["global load"]), 2),
    )


def bytes_in_flight(path: list[Instruction], is_loop: bool) -> int:
    """Return the most bytes of global loads that a thread waits for at the same time.

    A thread waits at the first instruction that uses or overwrites the result of a load. Loads
    return in order, so earlier loads have then returned too.
    """
    pending: list[tuple[frozenset[str], int]] = []
    most = 0
    for instruction in path * (2 if is_loop else 1):
        touched = instruction.reads | instruction.writes
        for position in range(len(pending) - 1, -1, -1):
            if pending[position][0] & touched:
                del pending[: position + 1]
                break
        if instruction.unit == "global load":
            pending.append((instruction.writes, width_of(instruction.opcode)))
            most = max(most, sum(width for _, width in pending))
    return most


def chain_cycles(path: list[Instruction], is_loop: bool, global_latency: int = LATENCY["global load"]) -> float:
    """Return the cycles that a warp takes if it has the multiprocessor for itself.

    For a loop, this is the time from one iteration to the next.
    """
    ready: dict[str, int] = {}
    time, starts = 0, []
    repeats = 6 if is_loop else 1
    for _ in range(repeats):
        starts.append(time)
        for instruction in path:
            time = max([time + 1, *(ready.get(register, 0) for register in instruction.reads | instruction.writes)])
            unit = instruction.unit
            latency = global_latency if unit == "global load" else LATENCY.get(unit, LATENCY["other"])
            if unit == "barrier":
                time += LATENCY["barrier"] if instruction.opcode.startswith("BAR") else 0
            for register in instruction.writes:
                ready[register] = time + latency
    return float(time - starts[-1]) if is_loop else float(time)
