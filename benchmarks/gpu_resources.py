"""What the compiler makes of the CUDA kernels, without a GPU: `python benchmarks/gpu_resources.py [--check]`.

Every csrc/cuda/*.cu is compiled for every architecture with spills, local memory and warnings as errors. One row per
instantiation of a kernel and architecture says what it takes (registers, shared memory, threads), how many of its
blocks an SM holds, and what its hottest loop consists of. All of it is counted, none of it is measured: instructions
are those of one pass through the code, as the compiler laid it out.

`--check` compares with the committed table instead of writing it; it needs nvcc and nothing else. The loops need
nvdisasm, of the toolkit, of `pip install nvidia-cuda-nvdisasm` (5 MB) or of triton; without it their columns stay
empty.
"""

from __future__ import annotations

import csv
import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
RESULTS = Path(__file__).parent / "results"

#: What the library is checked on.
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")

#: A spill, local memory or a warning fails.
FLAGS = ("-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings")
PTXAS_FLAGS = ("-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror")

#: Progress and what is wrong; the table goes to stdout.
console = Console(stderr=True)


def dynamic_shared_bytes() -> dict[str, int]:
    """Bytes of dynamic shared memory by mangled name of a kernel: the compiler can't know, the launch says.

    The launches are those that the tests' emulator notes; where it can't be built, the column stays empty.
    """
    sys.path.append(str(ROOT / "tests"))
    import cuda_emulator

    if reason := cuda_emulator.why_not():
        console.print(f"no dynamic shared memory in the table: {reason}")
        return {}
    from cuda_cases import small_cases

    kernels = cuda_emulator.Kernels(only_record=True)
    for case in small_cases():
        getattr(kernels, case.method)(**case.arguments)
    launches = kernels.launches()
    return {launch["kernel"]: launch["shared_bytes"] for launch in launches}


@dataclass(frozen=True)
class Limits:
    """What an SM holds at once.

    Attributes:
        shared: bytes of shared memory, of which each block's 1 KiB for the driver is a part.
        threads: resident threads.
        blocks: resident blocks.
    """

    shared: int
    threads: int
    blocks: int


#: Shared memory (the largest carve-out) and blocks: include/cuda_occupancy.h of CUDA 13.0. Threads: CUDA Programming
#: Guide, "Compute Capabilities", 64 or 48 warps. For 12.0 the Blackwell Tuning Guide says 128 KiB and 32 blocks, the
#: header and the Programming Guide 100 KiB and 24, as here.
LIMITS = {
    "sm_80": Limits(164 << 10, 2048, 32),
    "sm_86": Limits(100 << 10, 1536, 16),
    "sm_89": Limits(100 << 10, 1536, 24),
    "sm_90": Limits(228 << 10, 2048, 32),
    "sm_100": Limits(228 << 10, 2048, 32),
    "sm_120": Limits(100 << 10, 1536, 24),
}

#: The same on all of them (cuda_occupancy.h; the bytes that a block loses to the driver: CUDA Programming Guide).
WARP, REGISTERS, PARTITIONS, REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 32, 1 << 16, 4, 256, 128, 1024


def round_up(value: int, unit: int) -> int:
    """To a multiple of a unit."""
    return -(-value // unit) * unit


def occupancy(arch: str, registers: int, shared_bytes: int, threads: int) -> tuple[int, str]:
    """How many blocks an SM holds, and what limits them: several if they tie ("registers+shared").

    Args:
        arch: as in LIMITS.
        registers: of a thread.
        shared_bytes: of a block, static and dynamic.
        threads: of a block.
    """
    limits, warps = LIMITS[arch], -(-threads // WARP)
    warps_of_partition = REGISTERS // PARTITIONS // round_up(registers * WARP, REGISTER_UNIT)
    blocks = {
        "registers": PARTITIONS * warps_of_partition // warps,
        "shared": limits.shared // round_up(shared_bytes + SHARED_RESERVED, SHARED_UNIT),
        "threads": limits.threads // WARP // warps,
        "blocks": limits.blocks,
    }
    least = min(blocks.values())
    return least, "+".join(name for name, value in blocks.items() if value == least)


class Instruction(NamedTuple):
    """One line of SASS: `@!P0 BRA.U UP1, target` has the guard "@!P0", the base "BRA"."""

    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


#: Opcodes without modifiers: of the tensor cores, of integers and addresses (with moves, which IMAD does as well, and
#: the uniform twins with a U in front), and those that have a column each.
TENSOR = ("HMMA", "HGMMA", "UTCHMMA")
INTEGER = re.compile(
    "U?(IMAD|IADD3?|VIADD|LEA|SHF|SHL|SHR|LOP|LOP3|ISETP|V?IMNMX3?|VIADDMNMX|ISCADD|IABS|INEG|BMSK|SGXT|PRMT|"
    "SEL|MOV|BREV|FLO|POPC)|R2UR"
)
COUNTED = ("LDSM", "LDGSTS", "LDS", "STS", "LDG", "BAR", "MUFU")


@dataclass(frozen=True)
class Loop:
    """What the hottest loop of a kernel consists of; nothing if the kernel has none.

    Attributes:
        inner: loops within it; their instructions count once.
        opcodes: how often each stands there, without modifiers.
    """

    inner: int
    opcodes: Counter[str]

    def columns(self) -> dict[str, int | float]:
        """Of the CSV."""
        every, tensor = self.opcodes.total(), sum(self.opcodes[name] for name in TENSOR)
        return {
            "loop_instructions": every,
            "loop_inner_loops": self.inner,
            "loop_hmma": tensor,
            **{f"loop_{name.lower()}": self.opcodes[name] for name in COUNTED},
            "loop_integer": sum(count for name, count in self.opcodes.items() if INTEGER.fullmatch(name)),
            "loop_hmma_percent": round(100 * tensor / max(1, every), 1),
        }


@dataclass(frozen=True)
class Kernel:
    """An instantiation of a kernel on an architecture.

    Attributes:
        file: name of its source.
        name: short, as `gemm<__half, 64>`.
        mangled: as the linker calls it.
        arch: as in LIMITS.
        registers: of a thread.
        static_shared: bytes of a block.
        dynamic_shared: bytes of a block; None if unknown, and then it counts as none.
        threads: of a block at most, by __launch_bounds__; None without.
        spill: bytes stored and loaded for want of registers.
        stack: bytes of local memory.
        loop: the hottest; None without a disassembler.
    """

    file: str
    name: str
    mangled: str
    arch: str
    registers: int
    static_shared: int
    dynamic_shared: int | None
    threads: int | None
    spill: int
    stack: int
    loop: Loop | None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells rows apart."""
        return self.file, self.name, self.arch

    def __str__(self) -> str:
        return f"{self.file} {self.name} {self.arch}"

    def row(self) -> dict[str, str]:
        """Of the CSV; what isn't known is empty."""
        blocks, limiter, percent = None, None, None
        if self.threads is not None:
            shared = self.static_shared + (self.dynamic_shared or 0)
            blocks, limiter = occupancy(self.arch, self.registers, shared, self.threads)
            percent = round(100 * blocks * round_up(self.threads, WARP) / LIMITS[self.arch].threads)
        values: dict[str, object] = {
            "file": self.file,
            "kernel": self.name,
            "arch": self.arch,
            "registers": self.registers,
            "static_shared": self.static_shared,
            "dynamic_shared": self.dynamic_shared,
            "threads": self.threads,
            "spill": self.spill,
            "stack": self.stack,
            "blocks_per_sm": blocks,
            "occupancy_percent": percent,
            "limited_by": limiter,
        }
        loop = (self.loop or Loop(0, Counter())).columns()
        values |= loop if self.loop else dict.fromkeys(loop)
        return {name: "" if value is None else str(value) for name, value in values.items()}


class RejectedError(Exception):
    """A file that the compiler doesn't accept; the arguments are its complaints."""


def cuda_home() -> Path:
    """The toolkit."""
    return Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")


def nvcc_version() -> str:
    """As "13.0.88": registers are those of one compiler."""
    run = subprocess.run([cuda_home() / "bin" / "nvcc", "--version"], check=True, capture_output=True, text=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", run.stdout)
    return found[1] if found else "unknown"


@functools.cache
def find_nvdisasm() -> Path | None:
    """Of the toolkit, on PATH, or in a package; None without. cuobjdump wouldn't do: it calls nvdisasm."""
    folders = [cuda_home() / "bin", *map(Path, os.get_exec_path())]
    for package, inside in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        places = spec.submodule_search_locations if spec else None
        folders += [folder for place in places or () for folder in sorted(Path(place).glob(inside))]
    found = (shutil.which("nvdisasm", path=folder) for folder in folders)
    return next((Path(tool) for tool in found if tool), None)


@functools.cache
def demangled(symbol: str) -> str:
    """As C++ writes it, by the C++ library; the symbol itself if that can't be loaded."""
    try:
        library, free = ctypes.CDLL("libstdc++.so.6"), ctypes.CDLL(None).free
    except OSError:
        return symbol
    library.__cxa_demangle.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    text = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(ctypes.c_int()))
    if not text:
        return symbol
    try:
        return ctypes.string_at(text).decode()
    finally:
        free(text)


def short_name(symbol: str) -> str:
    """Demangled, without our namespaces, the result and the arguments; template arguments stay."""
    name = demangled(symbol).removeprefix("void ")
    for namespace in ("(anonymous namespace)::", "packedbert::cuda::", "packedbert::"):
        name = name.replace(namespace, "")
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def threads_of_blocks(ptx: str) -> dict[str, int]:
    """By mangled name, of the kernels that say so."""
    threads = {}
    for entry in ptx.split(".entry ")[1:]:
        head = entry.partition("{")[0]
        bound = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", head)
        if bound:
            x, y, z = (int(size or 1) for size in bound.groups())
            threads[head.split("(")[0].strip()] = x * y * z
    return threads


def resources(log: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Mangled name and registers, stack, spill and shared bytes of each kernel in the words of `ptxas -v`."""
    properties = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    frames = {name: (int(stack), int(out) + int(back)) for name, stack, out, back in re.findall(properties, log)}
    for name, rest in re.findall(r"Compiling entry function '(\S+)' for .*?Used (\d+ registers[^\n]*)", log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        stack, spill = frames[name]
        yield (
            name,
            {
                "registers": int(rest.split()[0]),
                "static_shared": int(shared[1]) if shared else 0,
                "stack": stack,
                "spill": spill,
            },
        )


class Code(NamedTuple):
    """The instructions of a kernel, and where its labels stand among them."""

    instructions: list[Instruction]
    labels: dict[str, int]


def disassemble(cubin: Path, nvdisasm: Path) -> dict[str, Code]:
    """The code of each kernel by mangled name. What never runs (`@!PT`: padding) is left out."""
    run = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True)
    kernels: dict[str, Code] = {}
    code = Code([], {})
    for line in run.stdout.splitlines():
        if section := re.match(r"//-+ (\S+) -+$", line):
            code = Code([], {})
            if section[1].startswith(".text."):
                kernels[section[1].removeprefix(".text.")] = code
        elif label := re.match(r"(\.L_x_\d+):$", line):
            code.labels[label[1]] = len(code.instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@\S+)\s+)?([A-Z]\S*?)(?:\s+(.*?))?\s*;", line):
            guard, opcode, operands = (group or "" for group in found.groups())
            if guard != "@!PT":
                code.instructions.append(Instruction(guard, opcode, operands))
    return kernels


def successors(code: Code) -> list[list[int]]:
    """Where each instruction can go on: a graph of the whole kernel, without the calls that return.

    A BSYNC goes where the BSSY of its barrier points. The way of BRA.DIV, for warps that have diverged where none
    should, is left out.
    """
    meeting = defaultdict(set)
    targets = [[code.labels[label] for label in re.findall(r"\.L_x_\d+", i.operands)] for i in code.instructions]
    for instruction, places in zip(code.instructions, targets, strict=True):
        if instruction.base == "BSSY":
            meeting[instruction.operands.partition(",")[0]].update(places)
    result = []
    for at, (instruction, places) in enumerate(zip(code.instructions, targets, strict=True)):
        base, following = instruction.base, at + 1
        certain = instruction.guard in ("", "@PT") and "," not in instruction.operands.partition("(")[0]
        onward = {following}
        if base in ("BRA", "BRX", "CALL") and not instruction.opcode.startswith("BRA.DIV"):
            onward |= set(places)  # a CALL of a label doesn't return: a jump
            if certain and base != "CALL":
                onward.discard(following)
        elif base in ("EXIT", "RET") and certain:
            onward.clear()
        elif base == "BSYNC" and (places := meeting[instruction.operands]) and following not in places:
            onward = places if certain else onward | places
        result.append(sorted(target for target in onward if target < len(code.instructions)))
    return result


def natural_loops(onward: list[list[int]]) -> dict[int, set[int]]:
    """The nodes of each loop by its head: the node that every way into the loop passes. Node 0 is the entry."""
    order, seen, stack = [], {0}, [(0, iter(onward[0]))] if onward else []
    while stack:  # depth first; a node comes after all that follow it
        node, rest = stack[-1]
        fresh = next((target for target in rest if target not in seen), None)
        if fresh is None:
            order.append(stack.pop()[0])
        else:
            seen.add(fresh)
            stack.append((fresh, iter(onward[fresh])))
    rank = {node: place for place, node in enumerate(order)}
    before = defaultdict(list)
    for node in order:
        for target in onward[node]:
            before[target].append(node)

    above = {0: 0}  # the closest node that every way from the entry passes (Cooper, Harvey, Kennedy 2001)

    def common(a: int, b: int) -> int:
        while a != b:
            while rank[a] < rank[b]:
                a = above[a]
            while rank[b] < rank[a]:
                b = above[b]
        return a

    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            closest = functools.reduce(common, (other for other in before[node] if other in above))
            changed |= above.get(node) != closest
            above[node] = closest

    loops: dict[int, set[int]] = {}
    for node in order:
        for head in onward[node]:
            if rank[head] >= rank[node] and common(head, node) == head:
                body, todo = loops.setdefault(head, {head}), [node]
                while todo:
                    if (member := todo.pop()) not in body:
                        body.add(member)
                        todo += before[member]
    return loops


def hottest_loop(code: Code) -> Loop:
    """Of the loops with tensor instructions and no such loop within the one with most; else the longest innermost."""
    loops = natural_loops(successors(code))
    inner = {head: [other for other in loops if other != head and other in body] for head, body in loops.items()}
    tensor = {head: sum(code.instructions[at].base in TENSOR for at in body) for head, body in loops.items()}
    hot = [head for head in loops if tensor[head] and not any(tensor[other] for other in inner[head])]
    candidates = hot or [head for head in loops if not inner[head]]
    if not candidates:
        return Loop(0, Counter())
    head = max(candidates, key=lambda head: (tensor[head], len(loops[head])))
    return Loop(len(inner[head]), Counter(code.instructions[at].base for at in loops[head]))


def compile_file(
    source: Path, arch: str, dynamic_shared: Mapping[str, int] | None = None, loops: bool = True
) -> list[Kernel]:
    """Compile a file, and look at its kernels.

    Args:
        source: a .cu.
        arch: as in LIMITS.
        dynamic_shared: bytes by mangled name.
        loops: also disassemble, if there is a disassembler.

    Raises:
        RejectedError: an error, a warning, a spill, or local memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        keep = ("-keep", "-keep-dir", folder)  # the PTX
        command = [cuda_home() / "bin" / "nvcc", *FLAGS, *PTXAS_FLAGS, *keep, "-cubin", f"-arch={arch}"]
        run = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True)
        log = run.stdout + run.stderr
        if run.returncode:
            lines = [line for line in log.splitlines() if re.search(r"\b(error|warning|fatal)\b", line)]
            raise RejectedError(
                *(re.sub(r"_Z\w+", lambda symbol: short_name(symbol[0]), line) for line in lines or [log])
            )
        threads = threads_of_blocks((Path(folder) / f"{source.stem}.ptx").read_text())
        nvdisasm = find_nvdisasm() if loops else None
        code = disassemble(cubin, nvdisasm) if nvdisasm else None
    kernels = [
        Kernel(
            file=source.name,
            name=short_name(mangled),
            mangled=mangled,
            arch=arch,
            dynamic_shared=(dynamic_shared or {}).get(mangled),
            threads=threads.get(mangled),
            loop=None if code is None else hottest_loop(code[mangled]),
            **taken,
        )
        for mangled, taken in resources(log)
    ]
    if twice := [name for name, count in Counter(kernel.name for kernel in kernels).items() if count > 1]:
        raise RejectedError(f"more than one kernel is called {', '.join(twice)}")
    return sorted(kernels, key=lambda kernel: kernel.name)


def compile_all(
    sources: list[Path], architectures: Iterable[str], compiler: Callable[[Path, str], list[Kernel]]
) -> tuple[list[Kernel], dict[tuple[str, str], list[str]]]:
    """Compile every file for every architecture, on MAX_JOBS processes.

    Returns:
        The kernels, and what was rejected, by file and architecture.
    """
    jobs = [(source, arch) for source in sources for arch in architectures]
    kernels: list[Kernel] = []
    rejected: dict[tuple[str, str], list[str]] = {}
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        running = [pool.submit(compiler, source, arch) for source, arch in jobs]
        progress = track(
            zip(jobs, running, strict=True),
            "nvcc",
            len(jobs),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        for (source, arch), job in progress:
            try:
                kernels += job.result()
            except RejectedError as error:
                rejected[source.name, arch] = list(error.args)
    order = list(LIMITS)
    return sorted(kernels, key=lambda kernel: (kernel.file, kernel.name, order.index(kernel.arch))), rejected


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none if it isn't there."""
    if not file.exists():
        return []
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows))


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """Replace a CSV."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def differences(kernels: list[Kernel], committed: list[dict[str, str]]) -> Iterator[str]:
    """What is wrong with kernels by the committed rows: kernels more or fewer, or more registers."""
    known = {(row["file"], row["kernel"], row["arch"]): int(row["registers"]) for row in committed}
    for kernel in kernels:
        registers = known.pop(kernel.key, None)
        if registers is None:
            yield f"{kernel}: not in the table"
        elif kernel.registers > registers:
            yield f"{kernel}: {kernel.registers} registers, {registers} in the table"
    for key in known:
        yield f"{' '.join(key)}: in the table, but there is no such kernel"


def show(rows: list[dict[str, str]]) -> None:
    """The table, for people: a line a row, without the columns that are the same for all."""
    names = {
        "registers": "regs",
        "static_shared": "static",
        "dynamic_shared": "dynamic",
        "blocks_per_sm": "blocks",
        "occupancy_percent": "occ %",
        "limited_by": "limit",
        "loop_instructions": "loop",
        "loop_inner_loops": "inner",
        "loop_integer": "int",
        "loop_hmma_percent": "HMMA %",
    }
    left = ("kernel", "arch", "limited_by")
    table = Table(caption="bytes; loop: instructions of the hottest one; counted, not measured", row_styles=["", "dim"])
    columns = [name for name in rows[0] if name not in ("file", "nvcc", "spill", "stack")]
    for name in columns:
        heading = names.get(name, name.removeprefix("loop_").upper() if name.startswith("loop_") else name)
        table.add_column(heading, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    Console(width=None if sys.stdout.isatty() else 250, markup=False, highlight=False).print(table)


def fail(problems: Iterable[str]) -> None:
    """Say what is wrong, and leave."""
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


@click.command()
@click.option("--check", is_flag=True, help="Compare with the table instead of writing it; exit 1 if it got worse.")
@click.option("--arch", "architectures", multiple=True, type=click.Choice(list(LIMITS)), help="Only this; repeatable.")
@click.option(
    "--sources", type=click.Path(path_type=Path), default=SOURCES, help="Folder of .cu.  [default: csrc/cuda]"
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "gpu_resources.csv", help="The table.")
def main(check: bool, architectures: tuple[str, ...], sources: Path, out: Path) -> None:
    """Compile the CUDA kernels, and tabulate what they take and what their hottest loops consist of."""
    chosen = architectures or ARCHITECTURES
    files = sorted(sources.glob("*.cu"))
    if not files:
        raise click.UsageError(f"no .cu in {sources}")
    if not (cuda_home() / "bin" / "nvcc").exists():
        raise click.UsageError(f"no nvcc in {cuda_home() / 'bin'}: set CUDA_HOME")
    if not check and find_nvdisasm() is None:
        console.print(
            "no nvdisasm (pip install nvidia-cuda-nvdisasm): the columns of the loops stay empty", style="yellow"
        )

    shared, version = dynamic_shared_bytes(), nvcc_version()
    compiler = functools.partial(compile_file, dynamic_shared=shared, loops=not check)
    kernels, rejected = compile_all(files, chosen, compiler)
    problems = [f"{file} {arch}: {line}" for (file, arch), lines in rejected.items() for line in lines]
    table = read(out)
    if check:
        versions = {row["nvcc"] for row in table} - {version}
        if versions:
            console.print(f"this is nvcc {version}, the table is of {', '.join(sorted(versions))}", style="yellow")
        compared = [row for row in table if row["arch"] in chosen and (row["file"], row["arch"]) not in rejected]
        problems += differences(kernels, compared)
    if problems:
        fail(problems)
    if check:
        print(
            f"{len(kernels)} rows of {', '.join(chosen)}: no spill, no local memory, no more registers than committed"
        )
        return
    rows = [{**kernel.row(), "nvcc": version} for kernel in kernels]
    show(rows)
    order = list(LIMITS)
    rows += [row for row in table if row["arch"] not in chosen] if architectures else []
    write(out, sorted(rows, key=lambda row: (row["file"], row["kernel"], order.index(row["arch"]))))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
