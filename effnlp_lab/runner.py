"""Execute notebooks headlessly, several at once, and say how each one ended: `effnlp run` and `effnlp test`.

Every notebook runs under papermill in a process of its own. That process writes which cell it has reached to a file,
so that a cell which kills the kernel, hangs, or outlives the time limit can be named: papermill alone marks every cell
of a dead notebook as completed. At the limit the whole tree of processes is killed, the kernel included (a kernel has
a process group of its own). `validate` does the same for nbval, which waits up to 2000 seconds for a dead kernel.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Literal

from effnlp_lab.device import GIB, Device, machine_memory_bytes, resolve
from effnlp_lab.errors import UsageError

State = Literal["ok", "failed", "died", "timed out"]

CPU_BYTES_PER_NOTEBOOK = 4 * GIB
GPU_BYTES_PER_NOTEBOOK = 20 * GIB
GPU_BYTES_PER_FAST_NOTEBOOK = 6 * GIB
MOST_WORKERS = 16
STRICT = {"EFFNLP_STRICT": "1"}  # a solution that its check refuses is a failure
FAST_LIMIT_SECONDS = 900.0
FULL_LIMIT_SECONDS = 3600.0
_POLL_SECONDS = 0.2
_DEAD_KERNEL_SECONDS = 15.0  # a busy machine may need some seconds from the last cell to the end
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r"^(?:Cell In\[(?P<count>\d+)\]|File )", re.MULTILINE)
_NBVAL_LINE = re.compile(r"::Cell (?P<number>\d+)(?: (?P<state>[A-Z]+))?")


@dataclass(frozen=True)
class CellName:
    """Where a notebook stopped. `index` counts the source notebook's cells from 0."""

    index: int
    first_line: str
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        tags = f" [{', '.join(self.tags)}]" if self.tags else ""
        return f"cell {self.index}{tags}: {self.first_line}"


@dataclass(frozen=True)
class Outcome:
    """How one notebook ended. `cell` is the one that failed, killed the kernel, or was running at the time limit."""

    notebook: str
    state: State
    seconds: float
    message: str = ""
    cell: CellName | None = None
    folder: str = ""

    def sentence(self) -> str:
        where = f" in {self.cell}" if self.cell else ""
        what = f": {self.message}" if self.message else ""
        return f"{self.notebook}: {self.state} after {self.seconds:.0f} s{where}{what}"


@dataclass(frozen=True)
class Plan:
    """How many notebooks at once, how many threads each, and which GPU each slot sees (None: leave it alone)."""

    jobs: int
    threads: int
    gpus: tuple[str | None, ...]


def run(
    notebooks: Sequence[Path],
    device: str = "auto",
    fast: str | bool = "auto",
    jobs: int | None = None,
    out: Path | None = None,
    timeout: float | None = None,
    student: bool = False,
) -> list[Outcome]:
    """Execute notebooks with papermill, in parallel, and return one Outcome each, in the order given.

    `out` (default `build/run`) gets a folder for each notebook with the executed notebook, its HTML, a log, and what
    the notebook saves; and `results.json`. `timeout` is in seconds, for a whole notebook. With `student`, a
    NotImplementedError that comes from a blank in an exercise cell is no failure; everything else is.
    Raises DeviceError where the device is not there, and UsageError for a notebook that does not exist.
    """
    target = resolve(device, fast)
    limit = timeout or (FAST_LIMIT_SECONDS if target.fast else FULL_LIMIT_SECONDS)
    out = (out or Path("build/run")).resolve()
    sources = [Path(notebook).resolve() for notebook in notebooks]
    for source in sources:
        if not source.is_file():
            raise UsageError(f"There is no notebook {source}: name an .ipynb file, or build it with `effnlp build`.")
    plan = plan_jobs(target, len(sources), jobs)
    stop = threading.Event()
    with _progress() as show, ThreadPoolExecutor(plan.jobs) as pool:
        slots: Queue[str | None] = Queue()
        for gpu in plan.gpus:
            slots.put(gpu)

        def work(source: Path, folder: Path) -> Outcome:
            gpu = slots.get()
            try:
                environment = _environment(target, plan.threads, gpu)
                outcome = _execute(source, folder, target, environment, limit, student, stop, show)
            finally:
                slots.put(gpu)
            show.finished(outcome)
            return outcome

        futures = [pool.submit(work, source, out / name) for source, name in zip(sources, _names(sources), strict=True)]
        try:
            outcomes = [future.result() for future in futures]
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return outcomes


def validate(
    notebook: Path,
    device: str = "auto",
    fast: str | bool = "auto",
    out: Path | None = None,
    timeout: float | None = None,
) -> Outcome:
    """Execute a notebook under nbval and compare the cells tagged `nbval-check-output` with their stored outputs.

    Runs on a copy under `out` (default `build/nbval`), so that what a notebook saves does not land beside it. A kernel
    that dies is noticed within seconds.
    """
    target = resolve(device, fast)
    limit = timeout or (FAST_LIMIT_SECONDS if target.fast else FULL_LIMIT_SECONDS)
    folder = (out or Path("build/nbval")).resolve() / notebook.stem
    folder.mkdir(parents=True, exist_ok=True)
    copy = Path(shutil.copy(notebook, folder))
    (folder / "pytest.ini").write_text("[pytest]\n")  # this run has no other configuration
    command = [sys.executable, "-m", "pytest", copy.name, "--nbval-lax", "--nbval-current-env", "-v", "--color=no"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout", "-p", "no:randomly"]
    command += ["--nbval-kernel-startup-timeout=120", f"--nbval-cell-timeout={int(limit) + 60}"]
    log = folder / f"{notebook.stem}.log"
    begin = time.monotonic()
    with log.open("w") as stream:
        process = _spawn(command, stream, folder, _environment(target) | STRICT)
        end = _supervise(process, limit, watch_kernel=True)
    seconds = time.monotonic() - begin
    text = log.read_text(errors="replace")
    states = [(int(m["number"]), m["state"]) for m in _NBVAL_LINE.finditer(text.partition("= FAILURES =")[0])]
    where = next((number for number, state in states if state in ("FAILED", "ERROR")), None)
    if end != "ended":
        where = states[-1][0] if states else None
    cell = None if where is None else _code_cell_name(copy, where)
    if end == "timed out":
        return Outcome(notebook.stem, "timed out", seconds, f"the limit is {limit:.0f} s", cell, str(folder))
    if end == "died":
        return Outcome(notebook.stem, "died", seconds, "the kernel died", cell, str(folder))
    if process.returncode != 0:
        return Outcome(notebook.stem, "failed", seconds, f"nbval says:\n{text}", cell, str(folder))
    return Outcome(notebook.stem, "ok", seconds, folder=str(folder))


def plan_jobs(device: Device, notebooks: int, jobs: int | None = None) -> Plan:
    """How to share this machine among notebooks.

    On a CPU: as many as cores and free memory allow, the cores divided among them. On GPUs: one a GPU, because
    notebooks measure time; a larger `jobs` shares a GPU as far as its memory goes. Where OMP_NUM_THREADS is set, no
    notebook gets more threads than it says.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}: expected 1 or more.")
    cores = usable_cores()
    if device.kind == "cuda":
        cards = _visible_gpus()
        count = min(jobs or len(cards), len(cards) * notebooks_a_card(device), max(1, notebooks))
        gpus: tuple[str | None, ...] = tuple(cards[slot % len(cards)] for slot in range(count))
    else:
        room = max(1, int(free_memory_bytes() // CPU_BYTES_PER_NOTEBOOK))
        count = min(jobs or min(cores, room), max(1, notebooks))
        gpus = (None,) * count
    return Plan(count, max(1, min(cores // count, threads_asked_for() or cores)), gpus)


def notebooks_a_card(device: Device) -> int:
    """How many notebooks of the device's size (fast or full) a GPU's memory holds at a time."""
    each = GPU_BYTES_PER_FAST_NOTEBOOK if device.fast else GPU_BYTES_PER_NOTEBOOK
    return max(1, device.memory_bytes // each)


def named_gpus() -> list[str] | None:
    """Numbers or UUIDs of the GPUs in CUDA_VISIBLE_DEVICES; None where it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if named is None else [one.strip() for one in named.split(",") if one.strip()]


def threads_asked_for() -> int | None:
    """The threads that OMP_NUM_THREADS grants a process; None where it says nothing."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is one number a level
    return int(said) if said.isdecimal() and int(said) else None


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory_bytes() -> int:
    """The memory that new processes may take, within this process's control group."""
    import psutil

    return min(psutil.virtual_memory().available, machine_memory_bytes())


# What the command line calls


def course_root() -> Path:
    """The folder with `solutions/` or `labs/`: the working directory, one of its parents, or the source tree."""
    here = Path.cwd()
    for folder in (here, *here.parents, source_root()):
        if folder and ((folder / "solutions").is_dir() or (folder / "labs").is_dir()):
            return folder
    raise UsageError(
        "There is no course here: expected a folder with solutions/ or labs/; change into a checkout of the course."
    )


def source_root() -> Path | None:
    """The checkout that this package is imported from, or None when it is installed without one."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def find_notebooks(labs: Iterable[str] = (), student: bool = False, root: Path | None = None) -> list[Path]:
    """The built notebooks of these labs (default: all), in `labs/` for students, else in `solutions/`."""
    side = (root or course_root()) / ("labs" if student else "solutions")
    found = {path.parent.name: path for path in sorted(side.glob("*/*.ipynb"))}
    names = list(labs) or list(found)
    absent = [name for name in names if name not in found]
    if absent or not names:
        what = ", ".join(absent) or "any lab"
        raise UsageError(f"There is no notebook of {what} in {side}: build it with `effnlp build`.")
    return [found[name] for name in names]


def run_cli(
    labs: Sequence[str],
    device: str,
    fast: str,
    jobs: int | None,
    student: bool,
    timeout: float | None = None,
    out: Path | None = None,
) -> int:
    """The verb `run`. Returns 0 when every notebook is ok, else 1."""
    side = "labs" if student else "solutions"
    notebooks = find_notebooks(labs, student)
    outcomes = run(notebooks, device, fast, jobs, out or course_root() / "build" / "run" / side, timeout, student)
    wrong = [outcome for outcome in outcomes if outcome.state != "ok"]
    for outcome in wrong:
        print(outcome.sentence())
    where = Path(outcomes[0].folder).parent
    print(f"{len(outcomes) - len(wrong)} of {len(outcomes)} notebooks ok; executed notebooks and HTML in {where}")
    return 1 if wrong else 0


def run_tests(device: str, arguments: Sequence[str]) -> int:
    """The verb `test`: pytest on tests/ (which executes the notebooks as well). Returns 0, 1 or 2.

    On a GPU: what needs one, and the notebooks; then the tests that need it alone.
    """
    root = source_root() or course_root()
    if not (root / "tests").is_dir():
        raise UsageError("The tests are not part of the installed package: run this in a checkout of the course.")
    kind = resolve(device).kind
    command = [sys.executable, "-m", "pytest", f"--device={device}"]
    environment = dict(os.environ, PYTHONPATH=_python_path())
    if kind == "cpu":
        environment["EFFNLP_DEVICE"] = "cpu"  # before pytest starts, so that Triton starts in its interpreter
    workers = workers_for_tests()
    if workers == 1 or any(argument.startswith(("-n", "--numprocesses", "--pdb", "-m")) for argument in arguments):
        return _pytest([*command, *arguments], root, environment)
    environment = threads_for(workers) | environment
    spread = spread_over(workers)
    if kind == "cpu":
        return _pytest([*command, *spread, *arguments], root, environment)
    together = _pytest([*command, *spread, "-m", "(gpu or notebook) and not alone", *arguments], root, environment)
    alone = _pytest([*command, "-m", "alone", *arguments], root, environment)
    return max(together, alone)


def spread_over(workers: int) -> tuple[str, ...]:
    """pytest's arguments for so many processes: tests that share an expensive fixture stay on one."""
    return ("-n", str(workers), "--dist", "loadgroup") if workers > 1 else ()


def workers_for_tests() -> int:
    """How many processes the tests are spread over."""
    return max(1, min(usable_cores(), int(free_memory_bytes() // CPU_BYTES_PER_NOTEBOOK), MOST_WORKERS))


def threads_for(workers: int) -> dict[str, str]:
    """The environment in which so many processes share the cores."""
    return dict.fromkeys(_THREAD_VARIABLES, str(max(1, usable_cores() // workers)))


def _pytest(command: Sequence[str], root: Path, environment: dict[str, str]) -> int:
    code = subprocess.call(command, cwd=root, env=environment)
    return code if code in (0, 1) else 0 if code == 5 and "alone" in command else 2  # 5: no such test


# One notebook in its own process


def _execute(
    source: Path,
    folder: Path,
    device: Device,
    environment: dict[str, str],
    limit: float,
    student: bool,
    stop: threading.Event,
    show: _Show,
) -> Outcome:
    """Run the child process below under the time limit, then name the cell, mark it, and write HTML."""
    folder.mkdir(parents=True, exist_ok=True)
    executed, events, log = folder / source.name, folder / "events.jsonl", folder / f"{source.stem}.log"
    for old in (executed, events, executed.with_suffix(".html")):
        old.unlink(missing_ok=True)
    order = {
        "source": str(source),
        "executed": str(executed),
        "events": str(events),
        "folder": str(folder),
        "parameters": {"DEVICE": device.kind, "FAST": "1" if device.fast else "0"},
        "student": student,
    }
    if not student:
        environment = environment | STRICT
    name = folder.name
    begin = time.monotonic()
    show.started(name)
    with log.open("w") as stream:
        process = _spawn([sys.executable, "-m", "effnlp_lab.runner", json.dumps(order)], stream, folder, environment)
        end = _supervise(process, limit, stop=stop, tick=lambda: show.at(name, _last_event(events)))
    seconds = time.monotonic() - begin
    last = _last_event(events)
    cell = _cell_name(source, last["cell"]) if "cell" in last else None
    state, message = _verdict(end, process.returncode, last, limit, log)
    if state == "ok":
        cell = None
    elif executed.is_file() and cell is not None and state in ("died", "timed out"):
        _mark(executed, last["executed_cell"], state, message)
    if executed.is_file():
        _write_html(executed)
    return Outcome(name, state, seconds, message, cell, str(folder))


def _verdict(end: str, code: int, last: dict[str, Any], limit: float, log: Path) -> tuple[State, str]:
    if end == "timed out":
        return "timed out", f"the limit is {limit:.0f} s"
    if end == "stopped":
        return "failed", "interrupted"
    event = last.get("event")
    if event == "done":
        return "ok", ""
    if event == "failed":
        return "failed", last["message"]
    if event == "died":
        return "died", "the kernel died (out of memory, a crash in native code, or an exit)"
    if code < 0:
        return "died", f"signal {-code} ended the process that ran it (out of memory, or someone's kill)"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "failed", f"the process that ran it ended without a verdict; its log ends: {lines[-1] if lines else 'empty'}"


def _child(order: dict[str, Any]) -> int:
    """Execute one notebook with papermill in this process, appending an event for every cell that starts."""
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    notebook = nbformat.read(order["source"], as_version=4)
    has_parameters = any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
    code_counts: dict[int, Any] = {}
    reached = {"cell": 0, "executed_cell": 0, "of": len(notebook.cells)}

    def tell(event: str, **details: Any) -> None:
        with open(order["events"], "a") as stream:
            stream.write(json.dumps({"event": event, **reached, **details}) + "\n")

    injected: list[int] = []

    def started(cell: Any, cell_index: int) -> None:
        if "injected-parameters" in cell.metadata.get("tags", []):
            injected.append(cell_index)
        reached.update(executed_cell=cell_index, cell=_source_index(cell_index, injected))
        tell("cell")

    def executed(cell: Any, cell_index: int, execute_reply: Any) -> None:
        code_counts[execute_reply["content"].get("execution_count")] = cell

    def erred(cell: Any, cell_index: int, execute_reply: Any) -> None:
        content = execute_reply["content"]
        if content["ename"] == "NotImplementedError" and _from_blank(content["traceback"], code_counts):
            note = nbformat.v4.new_output("stream", name="stdout", text=f"not attempted yet: {content['evalue']}\n")
            cell.outputs = [output for output in cell.outputs if output.output_type != "error"] + [note]

    try:
        papermill.execute_notebook(
            order["source"],
            order["executed"],
            parameters=order["parameters"] if has_parameters else None,
            kernel_name="python3",  # this environment's, whatever the notebook names
            language="python",
            cwd=order["folder"],
            progress_bar=False,
            start_timeout=120,
            allow_error_names=["NotImplementedError"] if order["student"] else [],
            on_cell_start=started,
            on_cell_executed=executed,
            on_cell_error=erred,
        )
    except PapermillExecutionError as error:
        index = error.cell_index
        message = _ANSI.sub("", f"{error.ename}: {error.evalue}")
        tell("failed", cell=_source_index(index, injected), executed_cell=index, message=message)
        return 1
    except DeadKernelError:
        tell("died")
        return 1
    tell("done")
    return 0


def _source_index(executed_index: int, injected: Iterable[int]) -> int:
    """The index in the source notebook of a cell of the executed one, where papermill has put in parameters."""
    return executed_index - sum(index < executed_index for index in injected)


def _from_blank(traceback: Sequence[str], code_counts: dict[int, Any]) -> bool:
    """Whether an exception's innermost frame is in an exercise cell, run before the one that raised."""
    frames = list(_FRAME.finditer(_ANSI.sub("", "\n".join(traceback))))
    if not frames or frames[-1]["count"] is None:
        return False
    metadata = getattr(code_counts.get(int(frames[-1]["count"])), "metadata", {})
    return bool(metadata.get("nbgrader", {}).get("solution"))


# Processes


def _spawn(command: Sequence[str], stream: Any, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def _supervise(
    process: subprocess.Popen[bytes],
    limit: float,
    stop: threading.Event | None = None,
    tick: Any = None,
    watch_kernel: bool = False,
) -> Literal["ended", "timed out", "died", "stopped"]:
    """Wait for a process; at the limit, on `stop`, or when its kernel is gone for good, kill it with all it started."""
    deadline = time.monotonic() + limit
    seen_kernel, gone_since = False, None
    try:
        while process.poll() is None:
            now = time.monotonic()
            if stop is not None and stop.is_set():
                return "stopped"
            if now > deadline:
                return "timed out"
            if watch_kernel:
                alive = _has_live_children(process.pid)
                seen_kernel = seen_kernel or alive
                gone_since = None if alive or not seen_kernel else gone_since or now
                if gone_since is not None and now - gone_since > _DEAD_KERNEL_SECONDS:
                    return "died"
            if tick is not None:
                tick()
            time.sleep(_POLL_SECONDS)
        return "ended"
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a running process with every descendant, each with its process group. Does nothing once it has ended."""
    import psutil

    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    _kill_group(process.pid)
    process.kill()
    for member in family:
        try:
            _kill_group(member.pid)
            member.kill()  # psutil checks that the number still names the same process
        except psutil.NoSuchProcess:
            continue
    process.wait()


def _kill_group(pid: int) -> None:
    """Kill the process group that this process leads, if it leads one."""
    if not hasattr(os, "killpg"):
        return
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _has_live_children(pid: int) -> bool:
    import psutil

    try:
        return any(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return True  # it ended while we looked: the next poll says so


def _environment(device: Device, threads: int | None = None, gpu: str | None = None) -> dict[str, str]:
    """The environment of a notebook: what it runs on, how many threads, and this package on its path."""
    environment = dict(os.environ, PYTHONPATH=_python_path(), EFFNLP_DEVICE=device.kind)
    environment["EFFNLP_FAST"] = "1" if device.fast else "0"
    environment["JUPYTER_PREFER_ENV_PATH"] = environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    for inherited in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        environment.pop(inherited)
    if threads is not None:
        environment.update({variable: str(threads) for variable in _THREAD_VARIABLES})
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return environment


def _python_path() -> str:
    """PYTHONPATH with the source tree first, so that kernels find this package where it is not installed."""
    root = source_root()
    ours = [str(root), str(root / "grading")] if root else []
    rest = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in ours]
    return os.pathsep.join(ours + rest)


def _visible_gpus() -> list[str]:
    named = named_gpus()
    if named:
        return named
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


# Notebooks


def _names(sources: Sequence[Path]) -> list[str]:
    """A folder name for each notebook: its own folder's where that tells them apart, else numbered stems."""
    names = [source.parent.name for source in sources]
    if len(set(names)) == len(names):
        return names
    return [f"{position:02d}_{source.stem}" for position, source in enumerate(sources)]


def _cell_name(notebook: Path, index: int) -> CellName:
    import nbformat

    cell = nbformat.read(notebook, as_version=4).cells[index]
    lines = [line.strip() for line in cell.source.splitlines() if line.strip()]
    return CellName(index, lines[0] if lines else "(empty)", tuple(cell.metadata.get("tags", [])))


def _code_cell_name(notebook: Path, number: int) -> CellName:
    """nbval counts code cells only."""
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    return _cell_name(notebook, [index for index, cell in enumerate(cells) if cell.cell_type == "code"][number])


def _mark(executed: Path, index: int, state: str, message: str) -> None:
    """Write into the executed notebook which cell ended it: papermill marks every cell of a dead notebook completed."""
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    sentence = f"The notebook stopped here ({state}): {message}."
    error = nbformat.v4.new_output("error", ename=state, evalue=message, traceback=[sentence])
    if notebook.cells[index].cell_type == "code":
        notebook.cells[index].outputs.append(error)
    for position, cell in enumerate(notebook.cells[index:]):
        if "papermill" in cell.metadata:
            cell.metadata.papermill.status = "pending" if position else "failed"
            cell.metadata.papermill.exception = None if position else True
    nbformat.write(notebook, executed)


_HTML_LOCK = threading.Lock()
# nbconvert's prompts, comments, numbers and operators are too pale to read for some, and its links too like the text.
_READABLE = """<style>
:root { --jp-cell-prompt-not-active-opacity: 1; --jp-mirror-editor-comment-color: #326868;
  --jp-mirror-editor-number-color: #007000; --jp-mirror-editor-operator-color: #8a18d6; }
.jp-RenderedHTMLCommon a:link, .jp-RenderedHTMLCommon a:visited { text-decoration: underline; }
</style>
"""


def _write_html(executed: Path) -> None:
    from nbconvert import HTMLExporter

    with _HTML_LOCK:
        body, _ = HTMLExporter().from_filename(str(executed))
    executed.with_suffix(".html").write_text(body.replace("</head>", f"{_READABLE}</head>", 1), encoding="utf-8")


def _last_event(events: Path) -> dict[str, Any]:
    """The last whole line of the child's events, or an empty dict before the first."""
    try:
        lines = events.read_text().split("\n")
    except OSError:
        return {}
    return json.loads(lines[-2]) if len(lines) > 1 else {}


# Progress


class _Show:
    """Progress in plain lines: one when a notebook starts, one when it ends."""

    def started(self, name: str) -> None:
        print(f"{name}: started", flush=True)

    def at(self, name: str, event: dict[str, Any]) -> None:
        pass

    def finished(self, outcome: Outcome) -> None:
        print(f"{outcome.notebook}: {outcome.state} in {outcome.seconds:.0f} s", flush=True)


class _Bars(_Show):
    """Progress as one bar a notebook, on a terminal."""

    def __init__(self, progress: Any) -> None:
        self.progress, self.bars = progress, {}

    def started(self, name: str) -> None:
        self.bars[name] = self.progress.add_task(name, total=None)

    def at(self, name: str, event: dict[str, Any]) -> None:
        if "cell" in event:
            self.progress.update(self.bars[name], completed=event["cell"], total=event["of"])

    def finished(self, outcome: Outcome) -> None:
        bar = self.bars[outcome.notebook]
        total = self.progress.tasks[bar].total or 1
        done = total if outcome.state == "ok" else self.progress.tasks[bar].completed
        self.progress.update(bar, description=f"{outcome.notebook} ({outcome.state})", completed=done, total=total)
        self.progress.stop_task(bar)


@contextmanager
def _progress():
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        yield _Show()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name = TextColumn("{task.description}")
    with Progress(name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as progress:
        yield _Bars(progress)


if __name__ == "__main__":
    raise SystemExit(_child(json.loads(sys.argv[1])))
