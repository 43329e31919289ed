"""How fast is what an optimizer does itself: perturb, restore, step? Against other SAMs and the bandwidth of memory.

No model runs: parameters have the shapes of real models and gradients that stay as they are. The bound of a case is the
time that its traffic takes at the bandwidth of a copy of the same weights, which is measured among the cases; see
:func:`cases` for what each has to read and write.

    python examples/benchmarks/phases.py                      # LightSAM, SAM and peers, on all models
    python examples/benchmarks/phases.py --models MiniLM-L6 --allocator reuse
    python examples/benchmarks/phases.py --table              # the table, from the committed results

``--allocator reuse`` has glibc keep the memory that is freed (Linux): by default large tensors are mapped anew each
time, and half of the time of who makes temporaries goes into page faults.
"""

from __future__ import annotations

import functools
import gc
import gzip
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import Phases, Timing, add, check_device, environment, interleaved, ratio, read, trace
from shapes import CONFIGS, Shapes, check_models, shapes_of
from torch import Tensor
from transformers import HfArgumentParser

from hf_lightsam import SAM, LightSAM, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue.suite.tables import markdown
from hf_lightsam.optim import SharpnessAwareOptimizer

RESULTS = Path(__file__).parent / "results" / "phases.json"

COPY = "copy of the weights"
OURS = "LightSAM-Adam"
FACTORED = f"{OURS}, factored ascent"
NATIVE = ", native"

GRAPHED = ", in a graph"

PEER_PASSES = 1 + 3 + 7
"""Of SAM over AdamW, whoever wrote it."""

HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(1 << 28)}
"""glibc's malloc maps nothing and gives nothing back."""


@dataclass
class BenchmarkArguments:
    """What to measure."""

    models: list[str] = field(default_factory=lambda: list(CONFIGS), metadata={"help": "Of " + ", ".join(CONFIGS)})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16."})
    repetitions: int = field(default=30, metadata={"help": "Turns that are measured."})
    memory: float = field(
        default=8.0, metadata={"help": "GiB to take: larger models lose layers, and fewer cases take turns."}
    )
    allocator: str = field(default="default", metadata={"help": "default, or reuse (glibc keeps what is freed)."})
    native: bool = field(
        default=True, metadata={"help": "LightSAM by its own kernels, too (float32 on a CPU; needs a C compiler)."}
    )
    peers: bool = field(default=True, metadata={"help": "Measure other people's SAM too (needs pytorch-optimizer)."})
    graph: bool = field(default=False, metadata={"help": "LightSAM's phases as a CUDA graph, too (device=cuda)."})
    profile: str | None = field(default=None, metadata={"help": "Folder for a profile of each case (torch.profiler)."})
    results: str = field(default=str(RESULTS), metadata={"help": "JSON file; runs of the same kind are replaced."})
    table: bool = field(default=False, metadata={"help": "Print the results that are there; measure nothing."})

    def __post_init__(self) -> None:
        check_models(self.models)
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"dtype={self.dtype!r}: expected float32 or bfloat16")
        if self.allocator not in ("default", "reuse"):
            raise UsageError(f"allocator={self.allocator!r}: expected default or reuse")
        if self.repetitions < 1:
            raise UsageError(f"repetitions={self.repetitions!r}: expected at least 1")
        if self.graph and torch.device(self.device).type != "cuda":
            raise UsageError(f"graph=True: device={self.device!r} has no CUDA graphs; expected device=cuda")
        if not self.memory > 0:
            raise UsageError(f"memory={self.memory!r}: expected GiB, a number above 0")


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        make: Returns the phases, from parameters that have gradients.
        passes: Least passes over memory, each of the size of the weights: a tensor is read, or written.
        copies: Memory beside weights and gradients, in sizes of the weights.
    """

    make: Callable[[list[Tensor]], Phases]
    passes: int
    copies: int


def of(optimizer: SharpnessAwareOptimizer) -> Phases:
    """Return the phases of an optimizer of ours."""
    return [("perturb", optimizer.perturb), ("restore", optimizer.restore), ("step", optimizer.step)]


def natively(optimizer: SharpnessAwareOptimizer) -> Phases:
    """Return the phases of an optimizer of ours that perturbs by its own kernels."""
    optimizer.use_ascent_kernels("native")
    return of(optimizer)


def copy(parameters: list[Tensor]) -> Phases:
    """Return the copy of the weights, which tells the bandwidth."""
    target = [torch.empty_like(parameter) for parameter in parameters]
    return [("step", torch.no_grad()(lambda: torch._foreach_copy_(target, parameters)))]


def cases(with_peers: bool, with_native: bool = False) -> dict[str, Case]:
    """Return the cases by name.

    Passes of AdamW: weights, gradient and two moments are read, weights and moments written, 7. Of a perturbation by
    SAM: the norm reads the gradient, then weights and gradient are read and a second copy is written, which changes
    places with the weights, so that restoring is free: 4. By LightSAM's forms: the norm, and each form's own step; the
    factored one measures the gradient and sums it up in one pass, and reads and writes moments of half the size. The
    native kernels' passes are all there are; torch's make the copy in passes of its own.
    """
    found = {
        COPY: Case(copy, 2, 1),
        "AdamW (fused)": Case(lambda p: [("step", torch.optim.AdamW(p, lr=1e-5, fused=True).step)], 7, 2),
        OURS: Case(lambda p: of(LightSAM(p, lr=1e-5)), 1 + 7 + 7, 5),
        f"{OURS}{NATIVE}": Case(lambda p: natively(LightSAM(p, lr=1e-5)), 1 + 7 + 7, 5),
        FACTORED: Case(lambda p: of(LightSAM(p, lr=1e-5, ascent_state="factored")), 1 + 4 + 7, 4),
        f"{FACTORED}{NATIVE}": Case(lambda p: natively(LightSAM(p, lr=1e-5, ascent_state="factored")), 1 + 4 + 7, 4),
        "LightSAM-Adagrad": Case(lambda p: of(LightSAM(p, lr=1e-5, variant="adagrad")), 1 + 5 + 5, 3),
        "LightSAM-AdaGrad-Norm": Case(lambda p: of(LightSAM(p, lr=1e-5, variant="adagrad_norm")), 1 + 3 + 1 + 3, 1),
        "SAM(AdamW)": Case(lambda p: of(SAM(p, "adamw", lr=1e-5)), 1 + 3 + 7, 3),
    }
    if not with_native:
        found = {name: case for name, case in found.items() if not name.endswith(NATIVE)}
    if with_peers:
        try:
            import peers
        except ImportError as error:
            raise UsageError(f"peers=True: {error}; expected pytorch-optimizer to be there, or --no_peers") from None
        for name, make in (("pytorch_optimizer", peers.packaged_sam), ("davda54 style", peers.two_step_sam)):
            found[f"{name} SAM(AdamW), as documented"] = Case(make, PEER_PASSES, 4)
            found[f"{name} SAM(AdamW), fused"] = Case(functools.partial(make, fused=True), PEER_PASSES, 4)
    return found


def make_parameters(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return random weights with random gradients."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for size in shapes.sizes:
        weights = 0.02 * torch.randn(size, generator=generator, device=device, dtype=dtype)
        weights.requires_grad_().grad = 1e-3 * torch.randn(size, generator=generator, device=device, dtype=dtype)
        parameters.append(weights)
    return parameters


def groups(found: Mapping[str, Case], copies: float) -> list[list[str]]:
    """Return which cases take turns: as many at once as there is memory for their ``copies``, each with the copy."""
    made: list[list[str]] = []
    left = -1.0
    for name, case in found.items():
        if name == COPY:
            continue
        if case.copies > left:
            made.append([COPY])
            left = copies - found[COPY].copies
        made[-1].append(name)
        left -= case.copies
    return made


def measure(arguments: BenchmarkArguments, name: str) -> dict[str, Any]:
    """Measure all cases on the shapes of one model: on the same weights, with states of their own.

    Returns:
        What goes into the result file; ``turns`` holds the seconds of each phase of the cases that took turns.
    """
    device, dtype = check_device(arguments.device), getattr(torch, arguments.dtype)
    found = cases(arguments.peers, arguments.native and device.type == "cpu" and dtype == torch.float32)
    most_copies = 2 + 1 + max(case.copies for case in found.values())
    budget = arguments.memory * 2**30 / dtype.itemsize
    shapes = shapes_of(name, budget / most_copies)
    turns = []
    for members in groups(found, budget / shapes.weights - 2):
        parameters = make_parameters(shapes, device, dtype)
        made = {case: found[case].make(parameters) for case in members}
        if arguments.graph:
            made |= {f"{case}{GRAPHED}": graphed(made[case]) for case in members if case.startswith("LightSAM")}
        timings = interleaved(made, arguments.repetitions, device)
        turns.append({case: {phase: one.seconds for phase, one in phases.items()} for case, phases in timings.items()})
        if arguments.profile:
            for case in members[1:]:
                profile(made[case], Path(arguments.profile) / f"{slug(f'{name} {case}')}.json.gz")
        del parameters, made
        gc.collect()
    settings = {"model": name, "dtype": arguments.dtype, "allocator": arguments.allocator, **environment(device)}
    return {**settings, "title": shapes.title, "weights": shapes.weights, "turns": turns}


def graphed(phases: Phases) -> Phases:
    """Return all phases as one, captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # makes the state
        for _ in range(3):
            for _, work in phases:
                work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _, work in phases:
            work()
    return [("step", graph.replay)]


def slug(name: str) -> str:
    """Return a name as one of a file: ``LightSAM-Adam, factored`` is ``lightsam-adam-factored``."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def profile(phases: Phases, path: Path) -> None:
    """Save a trace of one repetition, for chrome://tracing or Perfetto, without the name of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(profile_memory=True) as profiler:
        for phase, work in phases:
            with torch.profiler.record_function(phase):
                work()
    told = {name: value for name, value in trace(profiler).items() if name != "host_name"}
    path.write_bytes(gzip.compress(json.dumps(told, separators=(",", ":")).encode(), mtime=0))


def lines_of(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the lines of the table of one result."""
    found = cases(with_peers=False, with_native=True)
    lines: list[list[str]] = []
    for turn in result["turns"]:
        timings = {case: {phase: Timing(s) for phase, s in phases.items()} for case, phases in turn.items()}
        copies = timings[COPY]["step"]
        for case, phases in timings.items():
            whole = functools.reduce(Timing.__add__, phases.values())
            if case == COPY and lines:
                continue
            of_case = case.removesuffix(GRAPHED)
            passes = found[of_case].passes if of_case in found else PEER_PASSES
            low, high = whole.quartiles
            cells = [
                case,
                *(f"{1e3 * phases[name].median:.1f}" if name in phases else "" for name in ("perturb", "restore")),
                f"{1e3 * (phases.get('step') or phases['restore and step']).median:.1f}",
                f"{1e3 * whole.median:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})",
                str(passes),
                f"{ratio(whole, copies) * 2 / passes:.2f}",
            ]
            lines.append(cells)
    return lines


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of results in Markdown."""
    head = ["", "perturb", "restore", "step", "all, ms (quartiles)", "least passes", "time over the bound"]
    parts = []
    order = list(CONFIGS)
    for result in sorted(results, key=lambda result: (order.index(result["model"]), result["allocator"])):
        place = (
            f"{result['hardware']}, {result['threads']} threads" if result["device"] == "cpu" else result["hardware"]
        )
        title = f"**{result['title']}**, {result['weights'] / 1e6:.1f}M weights in {result['dtype']}; {place}, "
        title += f"torch {result['torch']}, {result['allocator']} allocator"
        parts += [title, "", markdown(head, lines_of(result), numbers_from=1), ""]
    return "\n".join(parts).strip()


def under_the_allocator(name: str) -> None:
    """Start anew with glibc's settings, which it reads when a process starts."""
    if name == "reuse" and any(os.environ.get(key) != value for key, value in HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP})


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("phases.py", (UsageError,)):
        (arguments,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
        if not arguments.table:
            under_the_allocator(arguments.allocator)
            for name in arguments.models:
                add(arguments.results, measure(arguments, name), ("model", "dtype", "allocator", "device", "hardware"))
        print(table(read(arguments.results)))


if __name__ == "__main__":
    main()
